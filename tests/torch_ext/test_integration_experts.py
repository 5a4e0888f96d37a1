import types

import pytest
import torch

pytest.importorskip("transformers.integrations.moe", reason="transformers before 5 has no registry of experts")
from transformers import AutoModelForCausalLM, MixtralConfig, NemotronHConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import oracles
from mmbal.integrations import experts
from mmbal.integrations.experts import experts_registry_status, mmbal_experts_forward

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))


def nemotron(implementation, dtype=torch.float32, **options):
    """A NemotronH of two mixture layers around an attention layer, with weights that can be seen in its output."""
    config = NemotronHConfig(
        vocab_size=64,
        hidden_size=32,
        layers_block_type=["moe", "attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        moe_shared_expert_intermediate_size=24,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def run(model):
    output = model(input_ids=IDS, labels=IDS, use_cache=False)
    model.zero_grad()
    output.loss.backward()
    return output.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"moe_latent_size": 16}])
@pytest.mark.parametrize("other", ["eager", "grouped_mm"])
def test_nemotron_h_gives_the_same_outputs_and_gradients_as_with_transformers_own_experts(other, options):
    theirs, ours = nemotron(other, **options), nemotron("mmbal", **options)
    assert ours.config._experts_implementation == "mmbal"
    ours.load_state_dict(theirs.state_dict())
    (expected, gradients), (logits, own) = run(theirs), run(ours)
    oracles.assert_near(logits, expected, 2e-6)
    assert set(gradients) <= set(own)
    for name, gradient in gradients.items():
        oracles.assert_near(own[name], gradient, 1e-5, name)
    moved = [name for name in own if ".experts." in name]
    assert len(moved) == 4 and all(own[name].abs().max() > 1e-4 for name in moved)


def test_bfloat16_is_as_near_to_float32_as_transformers_own():
    exact = nemotron("eager")
    expected, gradients = run(exact)
    pairs, errors = [("logits", expected), *((k, g) for k, g in gradients.items() if ".experts." in k)], {}
    for implementation in ("eager", "mmbal"):
        model = nemotron(implementation, torch.bfloat16)
        model.load_state_dict(exact.state_dict())
        logits, own = run(model)
        own["logits"] = logits
        errors[implementation] = [((own[k].float() - v).norm() / v.norm()).item() for k, v in pairs]
        assert own[pairs[1][0]].dtype == torch.bfloat16
    assert all(ours <= 1.5 * theirs + 1e-3 for ours, theirs in zip(errors["mmbal"], errors["eager"], strict=True))
    assert max(errors["mmbal"]) < 0.1


def test_autocast_runs_the_experts_in_low_precision():
    model = nemotron("mmbal")
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=IDS, use_cache=False).logits
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


def test_the_model_compiles_in_one_graph_with_gradients():
    model = nemotron("mmbal")
    expected, gradients = run(model)
    logits, own = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    oracles.assert_near(logits, expected, 2e-6)
    for name, gradient in gradients.items():
        oracles.assert_near(own[f"_orig_mod.{name}"], gradient, 1e-5, name)


def test_the_choice_stays_after_saving_and_is_made_again_at_loading(tmp_path):
    model = nemotron("mmbal").eval()
    model.save_pretrained(tmp_path)
    assert model.config._experts_implementation == "mmbal"
    assert "mmbal" not in (tmp_path / "config.json").read_text()  # transformers saves no implementations
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="mmbal")
    assert loaded.config._experts_implementation == "mmbal"
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    other.set_experts_implementation("mmbal")
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)


def make_experts(act="relu2", E=5, D=6, F=10, **options):
    """Experts in the way of transformers' models, with any of the options that its decorator knows."""
    has_bias, is_transposed = options.get("has_bias", False), options.get("is_transposed", False)

    @use_experts_implementation(**{"has_gate": False, **options})
    class SomeExperts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = E
            shape = (E, D, F) if is_transposed else (E, F, D)
            self.up_proj = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
            self.down_proj = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).transpose(1, 2).contiguous())
            if has_bias:
                self.up_proj_bias = torch.nn.Parameter(torch.randn(E, F, dtype=torch.float64))
                self.down_proj_bias = torch.nn.Parameter(torch.randn(E, D, dtype=torch.float64))
            self.act_fn = ACT2FN[act]

        def forward(self, *inputs):
            raise AssertionError("the experts' own forward")

    return SomeExperts(types.SimpleNamespace(_experts_implementation="mmbal"))


def routing(N=30, E=5, K=2):
    indices = torch.rand(N, E).argsort(1)[:, :K]
    return torch.randn(N, 6, dtype=torch.float64), indices, torch.rand(N, K, dtype=torch.float64)


def reference(module, x, indices, weights, activation="relu2"):
    w1, w2 = module.up_proj, module.down_proj
    if module.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    b1, b2 = (module.up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    return oracles.expert_mlp(x, w1, b1, w2, b2, weights, indices, activation=activation)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_biases_and_transposed_weights_are_served_with_their_gradients(has_bias, is_transposed):
    module = make_experts(has_bias=has_bias, is_transposed=is_transposed)
    x, indices, weights = routing()
    x.requires_grad_(), weights.requires_grad_()
    leaves = [x, weights, *module.parameters()]
    upstream = torch.randn(30, 6, dtype=torch.float64)
    results = []
    for y in (module(x, indices, weights), reference(module, x, indices, weights)):
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for ours, expected in zip(*results, strict=True):
        oracles.assert_near(ours, expected, 1e-11)


def test_no_tokens_give_no_rows():
    module = make_experts()
    y = module(torch.empty(0, 6, dtype=torch.float64), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert y.shape == (0, 6)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("linear", "identity"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("silu", "silu"),
        ("swish", "silu"),
    ],
)
def test_an_activation_of_transformers_is_computed_by_the_one_it_equals(theirs, ours):
    module = make_experts(theirs)
    x, indices, weights = routing()
    with torch.no_grad():
        y = module(x, indices, weights)
        oracles.assert_near(y, reference(module, x, indices, weights, ours), 1e-12)
        hidden = torch.linspace(-6, 6, 200, dtype=torch.float64)
        oracles.assert_near(module.act_fn(hidden), oracles.ACTIVATIONS[ours](hidden), 1e-7)


def test_another_activation_is_refused_by_name():
    with pytest.raises(ValueError, match="MishActivation"):
        make_experts("mish")(*routing())


def test_experts_elsewhere_give_nothing_and_get_no_gradient():
    module = make_experts()
    module._is_expert_parallel = True
    x, indices, weights = routing()
    elsewhere = torch.rand(indices.shape) < 0.4
    elsewhere[0] = True
    given = weights.clone().requires_grad_()
    before = indices.masked_fill(elsewhere, 5)
    asked = before.clone()
    y = module(x, asked, given)
    assert torch.equal(asked, before)
    expected = reference(module, x, indices, weights.masked_fill(elsewhere, 0))
    oracles.assert_near(y, expected, 1e-12)
    assert not y[0].any()
    y.sum().backward()
    assert not given.grad[elsewhere].any() and given.grad[~elsewhere].all()
    own = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    expected.sum().backward()
    for name, parameter in module.named_parameters():
        oracles.assert_near(own[name], parameter.grad, 1e-11, name)


def test_an_expert_that_does_not_exist_is_refused_without_expert_parallelism():
    x, indices, weights = routing()
    indices[3, 1] = 5
    with pytest.raises((RuntimeError, IndexError, ValueError), match="(?i)ind"):
        make_experts()(x, indices, weights)


def test_gated_experts_are_refused_and_not_replaced():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="mmbal")
    with pytest.raises(ValueError, match="MixtralExperts are gated"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="norm after them"):
        make_experts(has_post_expert_norm=True)(*routing())


def test_the_status_says_whether_the_name_is_known(monkeypatch):
    assert ALL_EXPERTS_FUNCTIONS["mmbal"] is mmbal_experts_forward
    assert "is registered" in experts_registry_status()
    monkeypatch.setattr(experts, "_registry", lambda: None)
    experts.register()  # an older transformers: nothing to do, and no error
    assert "not available" in experts_registry_status()
    monkeypatch.setattr(experts, "_registry", dict)
    assert "not registered" in experts_registry_status()
