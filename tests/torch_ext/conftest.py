import copy

import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are fastest so; the tests about threads choose their own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN (integers: their largest value), so an output that is not written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def at_each_thread_count():
    """Runs a function at 1, 2 and 5 threads and asserts that its tensors are bitwise the same."""

    def run(function):
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(function())
        for other in results[1:]:
            assert len(other) == len(results[0])
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    return run


CLIP_LAYERS = {"vision": 3, "text": 4}


def clip(seed, hidden_act="quick_gelu"):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    common = {"num_attention_heads": 2, "hidden_act": hidden_act, "attention_dropout": 0.0}
    config = CLIPConfig(
        text_config={
            **common,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": CLIP_LAYERS["text"],
            "vocab_size": 50,
            "max_position_embeddings": 9,
            "bos_token_id": 48,
            "eos_token_id": 49,
            "pad_token_id": 49,
        },
        vision_config={
            **common,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": CLIP_LAYERS["vision"],
            "image_size": 16,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    for name, parameter in model.named_parameters():  # fresh MLPs are almost zero: nothing could be seen through them
        if "mlp" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def make_clip():
    """make_clip(seed) -> a tiny CLIPModel with random weights."""
    return clip


@pytest.fixture
def clip_batch():
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(1, 48, (6, 9), generator=generator)
    input_ids[:, -1] = 49
    return {"input_ids": input_ids, "pixel_values": torch.randn(6, 3, 16, 16, generator=generator)}


@pytest.fixture
def siblings(make_clip):
    """siblings(base, count): copies of a model that differ from it in the weights of their MLP blocks only."""

    def make(base, count):
        models = [copy.deepcopy(base) for _ in range(count)]
        for seed, model in enumerate(models):
            generator = torch.Generator().manual_seed(100 + seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".mlp." in name:
                        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return models

    return make
