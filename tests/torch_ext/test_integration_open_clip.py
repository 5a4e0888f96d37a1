"""upcycle, architectures and training on open_clip's model classes."""

import copy
import importlib
import json
import sys
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mmbal
import oracles
from mmbal import MoEMLP
from mmbal.checkpoints.architecture import CLIPArchitecture, Mixture, TextTower, VisionTower
from mmbal.checkpoints.configuration import _mlp_ratio
from open_clips import LAYERS, batch, config, make, make_moe, open_clip

oc = mmbal.integrations.open_clip

VARIANTS = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "gelu_tanh": {"vision": {"act_kwargs": {"approximate": "tanh"}}},
    "layer_scale": {"vision": {"ls_init_value": 0.5}, "text": {"ls_init_value": 0.25}},
    "other_mlp_width": {"vision": {"mlp_ratio": 1.75}, "text": {"mlp_ratio": 1.7}},
    "qk_norm": {"vision": {"qk_norm": True}},
    "bias": {"init_logit_bias": -10.0},
}


def block_name(tower, layer, kind="CLIP"):
    text = "text.transformer" if kind == "CustomTextCLIP" else "transformer"
    return f"{'visual.transformer' if tower == 'vision' else text}.resblocks.{layer}.mlp"


def mixtures_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEMLP)}


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_equal_the_dense_model(kind, variant):
    dense = make(kind, **VARIANTS[variant])
    moe = mmbal.upcycle(copy.deepcopy(dense), num_experts=3, expert_init="copy")
    expected = [block_name(tower, i, kind) for tower, n in LAYERS.items() for i in range(n)]
    assert sorted(mixtures_of(moe)) == sorted(expected)
    images, texts = batch()
    with torch.no_grad():
        oracles.assert_near(moe.encode_image(images), dense.encode_image(images), 5e-6)
        oracles.assert_near(moe.encode_text(texts), dense.encode_text(texts), 5e-6)
        for ours, theirs in zip(moe(images, texts), dense(images, texts), strict=True):
            oracles.assert_near(ours, theirs, 5e-6)


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_layers_are_chosen_tower_by_tower(kind):
    moe = make_moe(kind, layers={"vision": "last:1", "text": [0, 2]})
    expected = [("vision", 2), ("text", 0), ("text", 2)]
    assert sorted(mixtures_of(moe)) == sorted(block_name(*at, kind) for at in expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_bf16"])
def test_a_model_of_lower_precision_is_upcycled_in_its_precision(tmp_path, precision):
    (tmp_path / "small-for-precision.json").write_text(json.dumps(config()))
    open_clip.add_model_config(tmp_path)
    dense = open_clip.create_model("small-for-precision", precision=precision).eval()
    dtype = open_clip.get_input_dtype(precision)
    moe = mmbal.upcycle(copy.deepcopy(dense), num_experts=2, expert_init="copy")
    assert {m.experts.w1.dtype for m in mixtures_of(moe).values()} == {dtype}
    images, texts = batch()
    with torch.no_grad():
        ours, theirs = moe(images.to(dtype), texts), dense(images.to(dtype), texts)
    for a, b in zip(ours, theirs, strict=True):
        oracles.assert_near(a.float(), b.float(), 4e-2 if dtype == torch.bfloat16 else 5e-3)


def router_stage_gradients(model, called):
    model.zero_grad()
    with mmbal.collect_router(called) as routers:
        features = called(*batch())
    loss = open_clip.ClipLoss()(*features) + mmbal.router_losses(routers).total
    loss.backward()
    return len(routers), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    moe = make_moe(kind).train()
    mmbal.freeze_except_router(moe)
    count, expected = router_stage_gradients(moe, moe)
    moe.set_grad_checkpointing()
    again, gradients = router_stage_gradients(moe, moe)
    assert count == again == sum(LAYERS.values())
    assert gradients.keys() == expected.keys() and len(gradients) == count
    assert all(torch.equal(gradients[name], expected[name]) and expected[name].any() for name in expected)


def test_it_compiles_as_one_graph():
    dense = make(vision={"layers": 1}, text={"layers": 1})
    moe = make_moe(model=dense).train()
    _, expected = router_stage_gradients(moe, moe)
    _, gradients = router_stage_gradients(moe, torch.compile(moe, backend="aot_eager", fullgraph=True))
    assert gradients.keys() == expected.keys()
    for name in expected:
        oracles.assert_near(gradients[name], expected[name], 1e-5, name)


def test_locking_the_image_tower_locks_its_mixtures():
    moe = make_moe()
    moe.lock_image_tower(unlocked_groups=2)  # the projection, and the last block with the last norm
    locked = {name: {p.requires_grad for p in mixture.parameters()} for name, mixture in mixtures_of(moe).items()}
    assert [locked[block_name("vision", i)] for i in range(3)] == [{False}, {False}, {True}]
    assert all(locked[block_name("text", i)] == {True} for i in range(4))


def test_a_tower_of_timm_is_upcycled_but_has_no_architecture():
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}
    with torch.device("meta"):
        dense = open_clip.CustomTextCLIP(16, vision, config()["text_cfg"])
    moe = mmbal.upcycle(dense, num_experts=2, expert_init="copy", layers={"vision": "last:2"})
    assert sorted(mixtures_of(moe)) == ["visual.trunk.blocks.10.mlp", "visual.trunk.blocks.11.mlp"]
    with pytest.raises(ValueError, match="visual must be a VisionTransformer, got TimmModel"):
        oc.architecture_of(moe)


def test_a_vit_of_real_size_from_create_model():
    dense = open_clip.create_model("ViT-B-32", force_quick_gelu=True).eval()
    images, texts = torch.randn(1, 3, 224, 224), open_clip.tokenize(["a photo of a cat"])
    with torch.no_grad():
        expected = dense(images, texts)
        moe = mmbal.upcycle(dense, num_experts=2, expert_init="copy", layers={"vision": "last:1", "text": [0]})
        for ours, theirs in zip(moe(images, texts), expected, strict=True):
            oracles.assert_near(ours, theirs, 5e-6)


VISION = VisionTower(32, 3, 2, 48, patch_size=8, image_size=24, activation="quick_gelu")
TEXT = TextTower(24, 4, 3, 40, 9, 50, "quick_gelu", eos_token_id=49, bos_token_id=48)
ALL = {
    "vision": Mixture((0, 1, 2), 4),
    "text": Mixture((1, 3), 3, top_k=1, normalize=False, dropout=0.1, output_dropout=0.2, router_bias=True),
}
ARCHITECTURES = {
    "dense": CLIPArchitecture(16, VISION, TEXT),
    "both": CLIPArchitecture(16, VISION, TEXT, ALL),
    "text alone": CLIPArchitecture(16, VISION, TEXT, {"text": replace(ALL["text"], layers=(0,))}),
    "gelu": CLIPArchitecture(
        16,
        replace(VISION, activation="gelu"),
        replace(TEXT, activation="gelu_tanh"),
        {"vision": Mixture((2,), 2, activation="gelu")},
    ),
    "long text": CLIPArchitecture(16, VISION, replace(TEXT, context_length=248)),
    "eos": CLIPArchitecture(16, VISION, replace(TEXT, eos_token_id=7, bos_token_id=6)),
    "eps": CLIPArchitecture(16, replace(VISION, layer_norm_eps=1e-6), TEXT),
    "one embedding": CLIPArchitecture(1, VISION, TEXT),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_built_from_an_architecture_has_it(name, device):
    model = oc.build_model(ARCHITECTURES[name], device=device)
    assert oc.architecture_of(model) == ARCHITECTURES[name]
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {device}


def test_the_dtype_of_a_built_model_is_what_was_asked():
    model = oc.build_model(ARCHITECTURES["both"], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("width", "mlp_width"), [(1408, 6144), (1664, 8192), (24, 41), (49, 103), (1000, 999), (7, 1)])
def test_the_mlp_ratio_gives_the_width_back(width, mlp_width):
    vision = replace(VISION, width=width, heads=1, mlp_width=mlp_width)
    cfg = oc.model_config(CLIPArchitecture(16, vision, TEXT))
    assert int(width * cfg["vision_cfg"]["mlp_ratio"]) == mlp_width


def test_every_mlp_width_comes_back():
    assert all(int(w * _mlp_ratio(w, f)) == f for w in range(1, 300) for f in range(1, 300))


REAL = ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-g-14", "ViT-bigG-14"]


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_at_real_size(name):
    with torch.device("meta"):
        dense = open_clip.CLIP(**open_clip.get_model_config(name))
    architecture = oc.architecture_of(dense)
    built = oc.build_model(architecture, "meta")
    assert shapes(built) == shapes(dense)
    mixtures = {
        tower: Mixture(tuple(range(architecture.tower(tower).layers)), 4, activation="gelu")
        for tower in ("vision", "text")
    }
    moe = shapes(oc.build_model(replace(architecture, mixtures=mixtures), "meta"))
    expected = shapes(mmbal.upcycle(dense, num_experts=4, expert_init="copy"))
    assert moe == expected
    assert [n for n in moe if ".mlp." not in n] == [n for n in shapes(built) if ".mlp." not in n]


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-B-32-quickgelu"])
def test_the_configuration_of_a_common_model_is_that_of_open_clip(name):
    cfg = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**cfg)
    assert oc.model_config(oc.architecture_of(model)) == cfg


def test_the_published_clip_moe_has_its_number_of_parameters():
    vision = VisionTower(1024, 24, 16, 4096, 14, 224, "quick_gelu")
    text = TextTower(768, 12, 12, 3072, 248, 49408, "quick_gelu")
    mixtures = {"vision": Mixture(tuple(range(24)), 4), "text": Mixture(tuple(range(12)), 4)}
    model = oc.build_model(CLIPArchitecture(768, vision, text, mixtures), "meta")
    second_positions = 248 * 768  # the published layout has two tables of them
    assert sum(p.numel() for p in model.parameters()) == 1_202_429_441 - second_positions
    assert sum(p.numel() for m in mixtures_of(model).values() for p in m.router.parameters()) == 135_168


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"vision": {"ls_init_value": 0.1}}, "ls_"),
        ({"init_logit_bias": -10.0}, "logit_bias"),
        ({"nonscalar_logit_scale": True}, "logit_scale"),
        ({"vision": {"pool_type": "avg"}}, "pool_type"),
        ({"vision": {"final_ln_after_pool": True}}, "final_ln_after_pool"),
        ({"vision": {"no_ln_pre": True}}, "ln_pre"),
        ({"vision": {"attentional_pool": True}}, "attn_pool|ln_post|proj"),
        ({"vision": {"qk_norm": True}}, "ln_q|ln_k|Attention|ln_attn|ln"),
        ({"vision": {"norm_kwargs": {"eps": 1e-3, "elementwise_affine": False}}}, "ln"),
        ({"vision": {"image_size": (16, 24)}}, "square"),
        ({"text": {"proj_bias": True}}, "text_projection"),
        ({"text": {"proj_type": "none"}}, "projection"),
        ({"text": {"pool_type": "last"}}, "pool_type"),
        ({"text": {"no_causal_mask": True}}, "attn_mask"),
        ({"vision": {"layers": (1, 1, 1, 1), "patch_size": None, "image_size": 32}}, "ModifiedResNet"),
    ],
)
def test_what_an_architecture_cannot_say_is_refused(change, what):
    with pytest.raises(ValueError, match=f"architecture_of: .*({what})"):
        oc.architecture_of(make(**change))


def test_changed_models_are_refused():
    moe = make_moe()
    for wrapped in (torch.compile(moe), nn.Sequential(moe)):
        with pytest.raises(ValueError, match="must be an open_clip.CLIP itself"):
            oc.architecture_of(wrapped)
    other = copy.deepcopy(moe)
    other.visual.transformer.resblocks[1].mlp.top_k = 1
    with pytest.raises(ValueError, match="mixture layers of vision must agree"):
        oc.architecture_of(other)
    other = copy.deepcopy(moe)
    other.visual.transformer.resblocks[1].mlp = MoEMLP(32, 128, 3, activation="gelu", bias=False)
    with pytest.raises(ValueError, match=r"resblocks\.1\.mlp\.experts\.b[12]"):
        oc.architecture_of(other)
    other = copy.deepcopy(moe)
    other.positional_embedding = nn.Parameter(torch.zeros(20, 24))
    with pytest.raises(ValueError, match="attn_mask"):
        oc.architecture_of(other)


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        (CLIPArchitecture(16, None, TEXT), "vision tower"),
        (CLIPArchitecture(None, VISION, TEXT), "embed_dim"),
        (CLIPArchitecture(16, VISION, replace(TEXT, activation="gelu")), "quick_gelu in both"),
        (CLIPArchitecture(16, replace(VISION, activation="relu"), replace(TEXT, activation="gelu")), "relu"),
        (CLIPArchitecture(16, replace(VISION, heads=5), TEXT), "heads = 5"),
        (CLIPArchitecture(16, VISION, TEXT, {"vision": Mixture((3,), 2)}), "vision has 3 layers"),
    ],
)
def test_architectures_that_open_clip_cannot_have_are_refused(architecture, what):
    with pytest.raises(ValueError, match=what):
        oc.build_model(architecture, "meta")


def training_arguments(**options):
    common = {"device": "cpu", "precision": "fp32", "accum_freq": 1, "skip_scheduler": True, "distill": False}
    common |= {"horovod": False, "grad_clip_norm": None, "rank": 0, "world_size": 1, "log_every_n_steps": 1}
    common |= {"batch_size": 6, "wandb": False, "local_rank": 0, "distributed": False, "model": "small"}
    common |= {"siglip": False, "local_loss": False, "gather_with_grad": False}
    return Namespace(**common | options)


class Loader(list):
    num_samples = 18

    @property
    def num_batches(self):
        return len(self)


@pytest.mark.parametrize("options", [{}, {"accum_freq": 3}, {"precision": "amp_bf16"}])
def test_the_router_stage_runs_in_the_training_loop_of_open_clip(options):
    train = pytest.importorskip("open_clip_train.train")
    args = training_arguments(**options)
    moe = make_moe(noise_std=0.5)
    moe.output_dict = True
    routers = mmbal.freeze_except_router(moe)
    before = copy.deepcopy(moe.state_dict())
    loss = oc.RouterLoss(open_clip.create_loss(args), moe, load_balance=0.01)
    optimizer = torch.optim.AdamW([p for p in moe.parameters() if p.requires_grad], lr=0.02)
    data = {"train": SimpleNamespace(dataloader=Loader(batch(i) for i in range(3)), set_epoch=lambda epoch: None)}

    def total():
        with torch.no_grad(), mmbal.collect_router(moe) as records:
            task = sum(open_clip.ClipLoss()(**moe(*b)).item() for b in data["train"].dataloader)
            return task + mmbal.router_losses(records).total.item()

    start = total()
    for epoch in range(4):
        train.train_one_epoch(moe, data, loss, epoch, optimizer, None, None, None, args)
    assert total() < start
    changed = {name for name, tensor in moe.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(routers)


def test_the_router_losses_are_added_to_the_loss_of_open_clip():
    moe = make_moe()
    task = open_clip.ClipLoss()
    loss = oc.RouterLoss(task, moe, load_balance=0.5, z=0.25)
    with torch.no_grad():
        moe(*batch(1))  # an evaluation is not counted
    with mmbal.collect_router(moe) as routers:
        features = moe(*batch())
    expected = mmbal.router_losses(routers, load_balance=0.5, z=0.25).total
    both = loss(*moe(*batch()), output_dict=True)
    assert both["router_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert both["contrastive_loss"].item() == pytest.approx(task(*features).item(), rel=1e-6)
    assert loss(*moe(*batch())).item() == pytest.approx((task(*features) + expected).item(), rel=1e-6)
    with torch.no_grad():
        assert loss(*moe(*batch())).item() == pytest.approx(task(*features).item(), rel=1e-6)


def test_a_loss_without_a_forward_and_a_model_without_mixtures_are_refused():
    moe = make_moe()
    loss = oc.RouterLoss(open_clip.ClipLoss(), moe)
    features = moe(*batch())
    loss(*features)
    with pytest.raises(RuntimeError, match="must run before each call"):
        loss(*features)
    with pytest.raises(ValueError, match="MoEMLP"):
        oc.RouterLoss(open_clip.ClipLoss(), make())


def test_without_open_clip_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmbal.integrations.open_clip")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModuleNotFoundError, match="needs open_clip: pip install open_clip_torch"):
        importlib.import_module("mmbal.integrations.open_clip")
