"""Upcycling from file to file: what mmbal.upcycle gives bit for bit, experts taken out again, stretched positions."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmbal
from checkpoint_helpers import SMALL, assert_same, random_checkpoint, state_dict, with_mixtures
from mmbal.checkpoints import (
    extract_expert,
    from_model,
    open_checkpoint,
    stretch_positions,
    upcycle_checkpoint,
    write_checkpoint,
)
from mmbal.checkpoints.layouts import is_ffn
from mmbal.checkpoints.writing import write_ffns


def siblings_of(base, count):
    """Checkpoints that differ from ``base`` in their FFNs only."""
    made = []
    for seed in range(1, count + 1):
        other = random_checkpoint(base.architecture, seed)
        made.append(replace(base, tensors={n: (other if is_ffn(n) else base).tensors[n] for n in base.tensors}))
    return made


OPTIONS = {
    "sources": {},
    "some layers": {"layers": "vision=last:1,text=0+2"},
    "without the base": {"include_base": False},
    "a shared expert": {"shared_expert": True, "shared_weight": 0.25},
    "another seed, normal routers": {"seed": 7, "router_init": "normal:0.02"},
    "copy": {"experts": 0, "num_experts": 3},
    "noise": {"experts": 0, "num_experts": 3, "expert_init": "noise", "noise_std": 0.1, "seed": 3},
    "drop": {"experts": 0, "num_experts": 3, "expert_init": "drop", "drop_ratio": 0.25, "shared_expert": True},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_files_get_the_same_weights_as_a_model(make_clip, siblings, case):
    options = dict(OPTIONS[case])
    base = make_clip(0)
    sources = siblings(base, options.pop("experts", 2))
    expected = mmbal.upcycle(copy.deepcopy(base), sources or None, **options)
    found = upcycle_checkpoint(from_model(base), [from_model(source) for source in sources], **options)
    assert_same(replace(found, format="model"), from_model(expected))


def test_drawn_experts_do_not_depend_on_the_order_in_which_they_are_read():
    options = {"num_experts": 3, "expert_init": "drop"}
    base = random_checkpoint(SMALL)
    forward, backward = (upcycle_checkpoint(base, **options) for _ in range(2))
    first = {name: forward[name] for name in forward.tensors}
    for name in reversed(backward.tensors):
        assert torch.equal(backward[name], first[name]), name


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_experts_may_be_files_of_ffns_alone(tmp_path, suffix):
    base = random_checkpoint(SMALL)
    whole = siblings_of(base, 2)
    parts = []
    for j, source in enumerate(whole):
        write_ffns(source, tmp_path / f"expert{j}{suffix}")
        parts.append(open_checkpoint(tmp_path / f"expert{j}{suffix}", format="openai", like=SMALL))
        assert all(is_ffn(name) for name in parts[j].tensors)
    assert_same(upcycle_checkpoint(base, parts), upcycle_checkpoint(base, whole))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_an_expert_may_be_one_tower_as_transformers_saves_it(tmp_path, prefix):
    """Version 5 saves it without the tower's name in front of its tensors, older ones with it."""
    base = random_checkpoint(SMALL)
    (whole,) = siblings_of(base, 1)
    lone = replace(SMALL, text=None, embed_dim=None)
    write_checkpoint(whole.changed(whole.tensors, lone), tmp_path / "tower", "transformers")
    file = tmp_path / "tower" / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    part = open_checkpoint(tmp_path / "tower", like=SMALL)
    assert_same(
        upcycle_checkpoint(base, [part], layers="vision=all"), upcycle_checkpoint(base, [whole], layers="vision=all")
    )
    with pytest.raises(ValueError, match=r"experts\[0\] \(.*tower\) must have transformer\.resblocks\.0"):
        upcycle_checkpoint(base, [part])


def test_experts_that_are_the_same_are_named_as_mmbal_upcycle_does():
    base = random_checkpoint(SMALL)
    (one,) = siblings_of(base, 1)
    with pytest.warns(UserWarning, match=r"the base and experts\[1\] have the same MLPs in all chosen layers"):
        upcycle_checkpoint(base, [one, base])
    with pytest.warns(UserWarning, match=r"experts\[0\] and experts\[1\] have the same MLPs"):
        upcycle_checkpoint(base, [one, one])


@pytest.mark.parametrize("std", [float("nan"), float("inf"), -1.0])
def test_noise_without_a_finite_deviation_is_refused(std):
    with pytest.raises(ValueError, match="noise_std must not be negative, and finite"):
        upcycle_checkpoint(random_checkpoint(SMALL), expert_init="noise", noise_std=std)


def test_strict_sharing_names_the_tensor_that_differs():
    base = random_checkpoint(SMALL)
    other = random_checkpoint(SMALL, 1)
    with pytest.raises(ValueError, match=r"experts\[0\].* in positional_embedding and \d+ more \(by up to"):
        upcycle_checkpoint(base, [other])


def test_mean_sharing_averages_what_is_no_ffn():
    base, other = random_checkpoint(SMALL), random_checkpoint(SMALL, 1)
    mixed = upcycle_checkpoint(base, [other], shared="mean")
    name = "transformer.resblocks.1.attn.out_proj.weight"
    assert torch.equal(mixed[name], ((base[name].double() + other[name].double()) / 2).float())
    expert = "transformer.resblocks.1.experts.1.c_fc.weight"
    assert torch.equal(mixed[expert], other[expert.replace("experts.1", "mlp")])


def test_a_source_without_a_chosen_layer_or_of_another_shape_is_named():
    base = random_checkpoint(SMALL)
    (source,) = siblings_of(base, 1)
    name = "transformer.resblocks.2.mlp.c_proj.bias"
    lacking = replace(source, tensors={n: t for n, t in source.tensors.items() if n != name})
    with pytest.raises(ValueError, match=rf"experts\[0\].* must have {name}"):
        upcycle_checkpoint(base, [lacking])
    upcycle_checkpoint(base, [lacking], layers="vision=all")  # not needed there
    wrong = replace(source, tensors=source.tensors | {name: source.tensors[name]._replace(shape=(5,))})
    with pytest.raises(ValueError, match=rf"{name} must be \[128\], got \[5\]"):
        upcycle_checkpoint(base, [wrong])


def test_a_source_with_another_activation_is_refused():
    base = random_checkpoint(SMALL)
    (source,) = siblings_of(base, 1)
    source.architecture = replace(SMALL, text=replace(SMALL.text, activation="gelu"))
    with pytest.raises(ValueError, match="must have activation quick_gelu in text, got gelu"):
        upcycle_checkpoint(base, [source])


def test_mixtures_are_not_upcycled_again():
    with pytest.raises(ValueError, match="base must be dense"):
        upcycle_checkpoint(random_checkpoint(with_mixtures(SMALL)))
    with pytest.raises(ValueError, match=r"experts\[0\] must be dense"):
        upcycle_checkpoint(random_checkpoint(SMALL), [random_checkpoint(with_mixtures(SMALL))])


@pytest.mark.parametrize("j", [0, 1, 2])
def test_each_expert_taken_out_again_is_the_source_it_came_from(j):
    base = random_checkpoint(SMALL)
    sources = [base, *siblings_of(base, 2)]
    mixed = upcycle_checkpoint(base, sources[1:])
    assert_same(extract_expert(mixed, j), sources[j])
    alone = extract_expert(mixed, j, ffn_only=True)
    assert set(alone.tensors) == {name for name in base.tensors if is_ffn(name)}


def test_experts_that_are_not_there_are_not_taken_out():
    with pytest.raises(ValueError, match="expert must be from 0 to 3 in vision, got 4"):
        extract_expert(random_checkpoint(with_mixtures(SMALL, text=())), 4)
    with pytest.raises(ValueError, match="must have mixtures"):
        extract_expert(random_checkpoint(SMALL), 0)


def clip_of_77(dtype=torch.float32, scale=1.0):
    checkpoint = random_checkpoint(replace(SMALL, text=replace(SMALL.text, context_length=77)), dtype=dtype)
    lazy = checkpoint.tensors["positional_embedding"]
    tensors = checkpoint.tensors | {"positional_embedding": lazy._replace(make=lambda: lazy.make() * scale)}
    return replace(checkpoint, tensors=tensors)


def test_stretched_positions_follow_the_formula_in_float16_operation_by_operation():
    base = clip_of_77(scale=5.0)
    stretched = stretch_positions(base, 248)
    assert stretched.architecture.text.context_length == 248
    p = base["positional_embedding"].half()
    expected = torch.empty(248, 128, dtype=torch.float16)
    expected[:20] = p[:20]
    for i in range(56):
        a, b = p[20 + i], p[21 + i]
        expected[20 + 4 * i] = a
        for r in (1, 2, 3):
            expected[20 + 4 * i + r] = ((4 - r) * a) / 4 + (r * b) / 4
    for r in range(4):
        expected[244 + r] = p[76] + (r * (p[76] - p[75])) / 4
    for name in ("positional_embedding", "positional_embedding_res"):
        assert torch.equal(stretched[name], expected.float()), name
    exact = base["positional_embedding"].double()
    assert (
        stretched["positional_embedding"][247].double() - (exact[76] + 0.75 * (exact[76] - exact[75]))
    ).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stretched_tables_keep_the_dtype_of_the_file(dtype):
    stretched = stretch_positions(clip_of_77(dtype), 248)
    assert stretched["positional_embedding"].dtype == stretched.tensors["positional_embedding"].dtype == dtype
    assert stretched["positional_embedding"].shape == (248, 128)


def test_other_numbers_of_positions_and_tables_stretched_already_are_refused():
    with pytest.raises(ValueError, match="77 positions become 248, got 250"):
        stretch_positions(clip_of_77(), 250)
    with pytest.raises(ValueError, match="one table of more than 21 positions"):
        stretch_positions(stretch_positions(clip_of_77(), 248), 932)
    with pytest.raises(ValueError, match="must have a text tower"):
        stretch_positions(random_checkpoint(replace(SMALL, text=None)), 248)


def test_reading_lazily_never_changes_the_source():
    base = random_checkpoint(SMALL)
    before = state_dict(base)
    mixed = upcycle_checkpoint(base, siblings_of(base, 1), shared="mean")
    for name in mixed.tensors:
        mixed[name]
    assert all(torch.equal(base[name], before[name]) for name in before)
