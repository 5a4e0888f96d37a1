"""Names and shapes of the tensors in each layout, against the libraries' own models and the published counts."""

from dataclasses import replace

import pytest
import torch

from checkpoint_helpers import L14, SMALL, random_checkpoint, with_mixtures
from mmbal.checkpoints import count_parameters
from mmbal.checkpoints.layouts import bindings, canonical_shapes, readers


def published_l14(**layers):
    """As the two released files: 248 positions, four experts in every block."""
    text = replace(L14.text, context_length=248, kept_positions=20)
    return with_mixtures(replace(L14, text=text), **layers)


def test_the_published_l14_has_915_tensors_and_1_202_429_441_parameters():
    architecture = published_l14()
    names = [binding.name for binding in bindings(architecture, "clipmoe")]
    assert len(names) == len(set(names)) == 915
    counts = count_parameters(architecture)
    assert counts.total == 1_202_429_441
    assert counts.active == 686_192_129
    assert counts.router == 135_168
    assert count_parameters(architecture, "vision").total == 908_412_928
    assert count_parameters(architecture, "vision").active == 505_513_984


def published_names(vision_layers=24, text_layers=12, experts=4):
    """The published state dict, name by name, as its description (spec, 4.1) lists it."""
    both = ("weight", "bias")
    names = {"positional_embedding", "positional_embedding_res", "text_projection", "logit_scale"}
    names |= {"token_embedding.weight", "visual.class_embedding", "visual.positional_embedding", "visual.proj"}
    names |= {"visual.conv1.weight"}
    names |= {f"{norm}.{kind}" for norm in ("ln_final", "visual.ln_pre", "visual.ln_post") for kind in both}
    for tower, layers in (("visual.transformer", vision_layers), ("transformer", text_layers)):
        for n in range(layers):
            block = f"{tower}.resblocks.{n}"
            names |= {f"{block}.attn.in_proj_{kind}" for kind in both}
            names |= {f"{block}.{part}.{kind}" for part in ("attn.out_proj", "ln_1", "ln_2") for kind in both}
            names.add(f"{block}.gate.weight")
            for j in range(experts):
                names |= {f"{block}.experts.{j}.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in both}
    return names


def test_the_names_are_those_of_the_published_state_dict():
    assert {binding.name for binding in bindings(published_l14(), "clipmoe")} == published_names()
    assert len(published_names()) == 915


def test_the_dense_l14_has_427_616_513_parameters_and_stretching_adds_321_792():
    assert count_parameters(L14).total == count_parameters(L14).active == 427_616_513
    stretched = replace(L14, text=replace(L14.text, context_length=248, kept_positions=20))
    assert count_parameters(stretched).total == 427_616_513 + 321_792
    assert count_parameters(L14, "vision").total == 303_966_208


def test_published_names_of_a_mixture_block_stand_in_the_block_itself():
    names = {binding.name: binding.shape for binding in bindings(published_l14(), "clipmoe")}
    assert names["visual.transformer.resblocks.23.gate.weight"] == (4, 1024)
    assert names["visual.transformer.resblocks.23.experts.3.c_fc.weight"] == (4096, 1024)
    assert names["visual.transformer.resblocks.23.experts.3.c_fc.bias"] == (4096,)
    assert names["transformer.resblocks.0.experts.0.c_proj.weight"] == (768, 3072)
    assert names["transformer.resblocks.0.experts.0.c_proj.bias"] == (768,)
    assert names["positional_embedding"] == names["positional_embedding_res"] == (248, 768)
    assert not [name for name in names if ".mlp." in name]


def test_mixtures_in_the_last_blocks_only_leave_the_other_blocks_dense():
    architecture = published_l14(vision=tuple(range(18, 24)), text=tuple(range(6, 12)))
    names = {binding.name for binding in bindings(architecture, "clipmoe")}
    assert "visual.transformer.resblocks.17.mlp.c_fc.weight" in names
    assert "visual.transformer.resblocks.18.gate.weight" in names
    assert "transformer.resblocks.5.mlp.c_proj.bias" in names
    assert "transformer.resblocks.6.experts.3.c_proj.bias" in names
    assert sum(".gate." in name for name in names) == 12


SIZES = {  # of transformers' configurations of OpenAI's models: width, layers, patch, image
    "B/32": (768, 12, 32, 224, 512, 8),
    "B/16": (768, 12, 16, 224, 512, 8),
    "L/14": (1024, 24, 14, 224, 768, 12),
    "L/14@336": (1024, 24, 14, 336, 768, 12),
}


@pytest.mark.parametrize("name", SIZES)
def test_transformers_names_are_those_of_its_own_model(name):
    from transformers import CLIPConfig, CLIPModel

    width, layers, patch, image, text_width, heads = SIZES[name]
    architecture = replace(
        L14,
        embed_dim=text_width,
        vision=replace(L14.vision, width=width, layers=layers, patch_size=patch, image_size=image, mlp_width=4 * width),
        text=replace(L14.text, width=text_width, heads=heads, mlp_width=4 * text_width),
    )
    config = CLIPConfig(
        text_config={"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_attention_heads": heads},
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "patch_size": patch,
            "image_size": image,
        },
        projection_dim=text_width,
    )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in CLIPModel(config).state_dict().items()}
    assert {binding.name: binding.shape for binding in bindings(architecture, "transformers")} == expected


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_models_of_one_tower_have_transformers_names_too(tower, projected):
    import transformers

    architecture = replace(L14, **{"text" if tower == "vision" else "vision": None})
    architecture = architecture if projected else replace(architecture, embed_dim=None)
    kind = "Vision" if tower == "vision" else "Text"
    model = getattr(transformers, f"CLIP{kind}Model" + ("WithProjection" if projected else ""))
    sizes = architecture.tower(tower)
    config = getattr(transformers, f"CLIP{kind}Config")(
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        projection_dim=768,
        **({"patch_size": 14} if tower == "vision" else {}),
    )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in model(config).state_dict().items()}
    assert {binding.name: binding.shape for binding in bindings(architecture, "transformers")} == expected


KINDS = {
    "dense": SMALL,
    "all": with_mixtures(SMALL),
    "some": with_mixtures(SMALL, vision=(1,), text=(0, 2)),
    "one tower": with_mixtures(SMALL, vision=()),
    "biased routers": with_mixtures(SMALL, router_bias=True, num_experts=3),
    "shared expert": with_mixtures(SMALL, shared_expert=True),
    "vision alone": replace(SMALL, text=None),
    "text alone, not projected": replace(SMALL, vision=None, embed_dim=None),
}
HELD = {
    "openai": ("dense", "vision alone", "text alone, not projected"),
    "clipmoe": ("dense", "all", "some", "one tower"),
    "open_clip": ("dense", "all", "some", "one tower", "biased routers", "shared expert"),
    "transformers": tuple(KINDS),
}


@pytest.mark.parametrize(("layout", "kind"), [(layout, kind) for layout, kinds in HELD.items() for kind in kinds])
def test_what_a_layout_writes_it_reads_back_bit_for_bit(layout, kind):
    checkpoint = random_checkpoint(KINDS[kind])
    found = bindings(KINDS[kind], layout)
    file = {}
    for binding in found:
        pieces = list(binding.pieces(checkpoint.__getitem__))
        file[binding.name] = torch.cat([piece.reshape(-1) for piece in pieces]).reshape(binding.shape)
    read = {name: make(file.__getitem__) for name, make in readers(found).items()}
    assert set(read) == set(canonical_shapes(KINDS[kind]))
    for name, tensor in read.items():
        assert torch.equal(tensor, checkpoint[name]), name


def test_projections_are_transposed_for_transformers_and_attention_is_split_in_q_k_v():
    checkpoint = random_checkpoint(SMALL)
    made = {
        binding.name: torch.cat([piece.reshape(-1) for piece in binding.pieces(checkpoint.__getitem__)]).reshape(
            binding.shape
        )
        for binding in bindings(SMALL, "transformers")
    }
    assert torch.equal(made["visual_projection.weight"], checkpoint["visual.proj"].T)
    assert torch.equal(made["text_projection.weight"], checkpoint["text_projection"].T)
    packed = checkpoint["transformer.resblocks.1.attn.in_proj_weight"]
    for i, which in enumerate("qkv"):
        name = f"text_model.encoder.layers.1.self_attn.{which}_proj.weight"
        assert torch.equal(made[name], packed[128 * i : 128 * (i + 1)])


def test_two_tables_of_positions_become_the_one_that_the_model_uses():
    architecture = replace(SMALL, text=replace(SMALL.text, kept_positions=20))
    checkpoint = random_checkpoint(architecture)
    for layout, name in (
        ("transformers", "text_model.embeddings.position_embedding.weight"),
        ("open_clip", "positional_embedding"),
    ):
        (binding,) = [b for b in bindings(architecture, layout) if b.name == name]
        table = torch.cat(binding.pieces(checkpoint.__getitem__))
        assert torch.equal(table[:20], checkpoint["positional_embedding"][:20])
        assert torch.equal(table[20:], checkpoint["positional_embedding_res"][20:])


@pytest.mark.parametrize("kind", ["all", "biased routers", "shared expert"])
def test_openai_holds_no_mixture(kind):
    with pytest.raises(ValueError, match="openai holds dense models only"):
        bindings(KINDS[kind], "openai")


@pytest.mark.parametrize("kind", ["biased routers", "shared expert"])
def test_the_published_layout_refuses_what_it_has_no_name_for(kind):
    with pytest.raises(ValueError, match="clipmoe cannot hold a"):
        bindings(KINDS[kind], "clipmoe")
