"""`mmbal mcl extract`: from a checkpoint and pairs to features."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mmbal.cli import app
from mmbal.mcl import Features, cluster_stages, extract_features, merge_features
from mmbal.mcl.processing import OPENAI_MEAN, OPENAI_STD, clip_images

N, SIDE = 23, 16
WORDS = ["a", "cat", "dog", "on", "red", "blue", "mat"]


def save_tokenizer(folder):
    """CLIP's tokenizer with a vocabulary that the tiny model has."""
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate([letter + end for end in ("</w>",) for letter in letters])}
    vocabulary |= {letter: len(vocabulary) + i for i, letter in enumerate(letters[:20])}
    vocabulary |= {"<|startoftext|>": 48, "<|endoftext|>": 49}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


def save_image_processor(folder, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)):
    from transformers import AutoImageProcessor

    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return AutoImageProcessor.from_pretrained(folder)


@pytest.fixture
def checkpoint(tmp_path, make_clip):
    """A folder with a tiny CLIP and its tokenizer, without an image processor."""
    folder = tmp_path / "model"
    make_clip(0).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def pictures(folder, n=N, seed=0):
    """Pictures of various sizes with captions: names and captions."""
    generator = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(n):
        height, width = generator.integers(SIDE, 3 * SIDE, 2)
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"{i}.png")
        rows.append((f"{folder.name}/{i}.png", " ".join(generator.choice(WORDS, 3))))
    return rows


def write_table(path, rows, header=("image", "caption"), delimiter="\t"):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "pairs.tsv", pictures(tmp_path / "pictures"))


def by_hand(folder, table, preprocess):
    """Features as transformers gives them, one pair at a time."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images, texts = [], []
    with open(table, encoding="utf-8", newline="") as file, torch.no_grad():
        for row in csv.DictReader(file, delimiter="\t"):
            pixels = preprocess(Image.open(table.parent / row["image"]).convert("RGB"))
            ids = tokenizer([row["caption"]], truncation=True, max_length=9, return_tensors="pt")
            out = model(pixel_values=pixels[None], **ids)
            images.append(out.image_embeds)
            texts.append(out.text_embeds)
    return torch.cat(images), torch.cat(texts)


def same(first, second):
    names = ("images", "texts", "index", "skipped")
    return all(torch.equal(getattr(first, n), getattr(second, n)) for n in names) and first.source == second.source


QUIET = {"progress": False, "workers": 2}


# --- images


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (16, 40), (22, 30), (100, 60), (8, 10)])
def test_the_usual_processing_of_images_is_that_of_transformers(tmp_path, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    theirs = save_image_processor(tmp_path, OPENAI_MEAN, OPENAI_STD)(images=[image], return_tensors="pt")
    torch.testing.assert_close(clip_images(16)(image), theirs["pixel_values"][0], rtol=1e-5, atol=1e-5)


# --- features


def test_features_are_the_unit_vectors_that_transformers_gives_for_each_pair_alone(tmp_path, checkpoint, table):
    found = extract_features(checkpoint, table, tmp_path / "f.safetensors", batch=5, dtype="float32", **QUIET)
    images, texts = by_hand(checkpoint, table, clip_images(SIDE))
    torch.testing.assert_close(found.images, F.normalize(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.texts, F.normalize(texts), rtol=1e-5, atol=1e-6)
    assert found.index.tolist() == list(range(N)) and not len(found.skipped)
    assert same(Features.load(tmp_path / "f.safetensors"), found)
    half = extract_features(checkpoint, table, tmp_path / "h.safetensors", **QUIET)
    assert half.images.dtype == torch.float16
    torch.testing.assert_close(half.images.float(), found.images, rtol=0, atol=1e-3)


def test_images_go_through_the_processor_of_the_models_folder(tmp_path, checkpoint, table):
    usual = extract_features(checkpoint, table, tmp_path / "usual.safetensors", dtype="float32", **QUIET)
    processor = save_image_processor(checkpoint)
    found = extract_features(checkpoint, table, tmp_path / "f.safetensors", dtype="float32", **QUIET)
    images, _ = by_hand(
        checkpoint, table, lambda image: processor(images=[image], return_tensors="pt")["pixel_values"][0]
    )
    torch.testing.assert_close(found.images, F.normalize(images), rtol=1e-5, atol=1e-6)
    assert found.source.differs_in(usual.source) == ["processing"]
    with pytest.raises(ValueError, match=r"usual.safetensors has other features, which differ in processing"):
        extract_features(checkpoint, table, tmp_path / "usual.safetensors", dtype="float32", **QUIET)


def test_a_model_in_training_mode_is_evaluated_and_left_in_training_mode(tmp_path, make_clip, checkpoint, table):
    model = make_clip(0)
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    model.train()
    found = extract_features(model, table, tmp_path / "f.safetensors", tokenizer=checkpoint, **QUIET)
    assert model.training
    assert same(found, extract_features(checkpoint, table, tmp_path / "g.safetensors", **QUIET))


def prepared(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 48, (n, 9), generator=generator)
    ids[torch.arange(n), torch.randint(1, 9, (n,), generator=generator)] = 49
    return {"pixel_values": torch.randn(n, 3, SIDE, SIDE, generator=generator), "input_ids": ids}


def test_prepared_tensors_need_no_processing(tmp_path, make_clip):
    tensors, model = prepared(), make_clip(0)
    save_file(tensors, tmp_path / "pairs.safetensors")
    np.savez(tmp_path / "pairs.npz", **{name: value.numpy() for name, value in tensors.items()})
    with torch.no_grad():
        out = model(**tensors)
    for kind in ("safetensors", "npz"):
        found = extract_features(
            model, tmp_path / f"pairs.{kind}", tmp_path / f"f-{kind}.safetensors", batch=7, dtype="float32", **QUIET
        )
        torch.testing.assert_close(found.images, F.normalize(out.image_embeds), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.texts, F.normalize(out.text_embeds), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels_first", [False, True])
def test_prepared_images_of_bytes_go_through_the_image_processing(tmp_path, make_clip, channels_first):
    pixels = np.random.default_rng(0).integers(0, 256, (N, 20, 24, 3), dtype=np.uint8)
    images = pixels.transpose(0, 3, 1, 2) if channels_first else pixels
    np.savez(tmp_path / "pairs.npz", images=images, input_ids=prepared()["input_ids"].numpy())
    found = extract_features(make_clip(0), tmp_path / "pairs.npz", tmp_path / "f.safetensors", dtype="float32", **QUIET)
    expected = torch.stack([clip_images(SIDE)(Image.fromarray(image)) for image in pixels])
    with torch.no_grad():
        embeds = make_clip(0).get_image_features(pixel_values=expected)
    embeds = getattr(embeds, "pooler_output", embeds)
    torch.testing.assert_close(found.images, F.normalize(embeds), rtol=1e-5, atol=1e-6)


def test_shards_together_are_all_pairs(tmp_path, checkpoint, table):
    whole = extract_features(checkpoint, table, tmp_path / "f.safetensors", dtype="float32", **QUIET)
    parts = [
        extract_features(
            checkpoint, table, tmp_path / f"{i}.safetensors", dtype="float32", shard=(i, 4), batch=4, **QUIET
        )
        for i in range(4)
    ]
    assert [len(part) for part in parts] == [5, 6, 6, 6]
    merged = merge_features(parts)
    assert merged.source == whole.source and torch.equal(merged.index, whole.index)
    torch.testing.assert_close(merged.images, whole.images, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="f.safetensors is of shard 0/1"):
        extract_features(checkpoint, table, tmp_path / "f.safetensors", dtype="float32", shard=(0, 4), **QUIET)


# --- going on


class Killed(BaseException):
    pass


def stopping(model, after):
    """The model, but the process dies at a call."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed

    return model.vision_model.register_forward_pre_hook(count)


@pytest.mark.parametrize("after", [0, 1, 4, 7])
def test_a_stopped_run_goes_on_with_the_part_it_was_at_and_ends_the_same(tmp_path, make_clip, checkpoint, table, after):
    options = QUIET | {"batch": 3, "part": 6, "tokenizer": checkpoint}
    whole = extract_features(make_clip(0), table, tmp_path / "whole.safetensors", **options)
    model, out = make_clip(0), tmp_path / "f.safetensors"
    hook = stopping(model, after)
    with pytest.raises(Killed):
        extract_features(model, table, out, **options)
    hook.remove()
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "f.safetensors.parts").glob("*")}
    assert len(kept) == after // 2

    batches = []
    model.vision_model.register_forward_pre_hook(lambda *_: batches.append(1))
    assert same(extract_features(model, table, out, **options), whole)
    assert len(batches) == 8 - 2 * (after // 2)
    assert not (tmp_path / "f.safetensors.parts").exists()
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert same(extract_features(model, table, out, **options), whole)
    assert len(batches) == 8 - 2 * (after // 2)  # a finished file is read


def test_a_killed_command_goes_on(tmp_path, checkpoint, table):
    rows = [(f"pictures/{i % N}.png", "a cat") for i in range(3000)]
    many = write_table(tmp_path / "many.tsv", rows)
    out = tmp_path / "f.safetensors"
    command = [sys.executable, "-m", "mmbal.cli", "mcl", "extract", "--model", checkpoint, "--pairs", many]
    command += ["--out", out, "--batch", "16", "--workers", "1"]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    parts, deadline = tmp_path / "f.safetensors.parts", time.monotonic() + 300
    while not list(parts.glob("*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == -signal.SIGKILL, error
    kept = list(parts.glob("[0-9]*.safetensors"))
    assert kept and not out.exists()
    result = run("extract", "--model", checkpoint, "--pairs", many, "--out", out, "--batch", 16)
    assert result.exit_code == 0, result.output
    found = Features.load(out)
    assert found.index.tolist() == list(range(3000))
    last = len(found) - len(found) % N  # the same pictures again
    torch.testing.assert_close(found.images[:N], found.images[last - N : last], rtol=0, atol=2e-3)
    assert not parts.exists()


def half_done(tmp_path, checkpoint, make_clip, table, **options):
    options = QUIET | {"batch": 6, "part": 6, "tokenizer": checkpoint} | options
    model = make_clip(0)
    hook = stopping(model, 2)
    with pytest.raises(Killed):
        extract_features(model, table, tmp_path / "f.safetensors", **options)
    hook.remove()
    return model, options


@pytest.mark.parametrize("change", ["model", "pairs", "processing", "dtype", "autocast"])
def test_parts_of_other_features_are_not_gone_on_with(tmp_path, make_clip, checkpoint, table, change):
    model, options = half_done(tmp_path, checkpoint, make_clip, table)
    if change == "model":
        with torch.no_grad():
            model.text_projection.weight[0, 0] += 1e-3
    elif change == "pairs":
        table.write_text(table.read_text().replace("cat", "dog", 1))
    elif change == "processing":
        save_image_processor(tmp_path)
        options["image_processor"] = tmp_path
    else:
        options[change] = {"dtype": "float32", "autocast": "bfloat16"}[change]
    with pytest.raises(ValueError, match=f"parts has parts of other features, which differ in {change}: remove it"):
        extract_features(model, table, tmp_path / "f.safetensors", **options)


def test_a_damaged_part_is_named(tmp_path, make_clip, checkpoint, table):
    model, options = half_done(tmp_path, checkpoint, make_clip, table)
    part = tmp_path / "f.safetensors.parts" / "0-6.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"0-6.safetensors cannot be read: remove it"):
        extract_features(model, table, tmp_path / "f.safetensors", **options)
    part.unlink()
    assert len(extract_features(model, table, tmp_path / "f.safetensors", **options)) == N


# --- broken images


def spoil(folder):
    """Files of all kinds that are no images, by row."""
    spoiled = {2: b"", 5: b"no image at all", 11: (folder / "11.png").read_bytes()[:200]}
    for row, content in spoiled.items():
        (folder / f"{row}.png").write_bytes(content)
    (folder / "17.png").unlink()
    Image.new("RGB", (5000, 1)).save(folder / "20.png")
    (folder / "21.png").unlink()
    (folder / "21.png").mkdir()
    return [2, 5, 11, 17, 20, 21]


def test_a_broken_image_is_an_error_with_its_row_and_line(tmp_path, checkpoint, table):
    spoil(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"row 2 \(line 4, .*2\.png\): the image cannot be read"):
        extract_features(checkpoint, table, tmp_path / "f.safetensors", **QUIET)
    assert not (tmp_path / "f.safetensors").exists()


def test_broken_images_are_left_out_and_listed_where_that_is_asked_for(tmp_path, checkpoint, table):
    whole = extract_features(checkpoint, table, tmp_path / "whole.safetensors", **QUIET)
    rows, out, said = spoil(tmp_path / "pictures"), tmp_path / "f.safetensors", []
    found = extract_features(checkpoint, table, out, skip_broken=True, part=6, say=said.append, **QUIET)
    kept = [row for row in range(N) if row not in rows]
    assert found.index.tolist() == kept and found.skipped.tolist() == rows
    torch.testing.assert_close(found.images, whole.images[kept], rtol=0, atol=1e-3)
    listed = (tmp_path / "f.safetensors.skipped.txt").read_text().splitlines()
    assert [line.split()[1] for line in listed] == [str(row) for row in rows]
    assert "6 pairs are left out" in said[0]
    labels = cluster_stages([Features.load(out)], 2).labels
    assert np.flatnonzero(labels < 0).tolist() == rows
    with pytest.raises(ValueError, match="leaves out 6 pairs"):
        extract_features(checkpoint, table, out, **QUIET)


def test_a_repaired_image_is_read_when_the_run_goes_on(tmp_path, make_clip, checkpoint, table):
    good = (tmp_path / "pictures" / "2.png").read_bytes()
    (tmp_path / "pictures" / "2.png").write_bytes(b"")
    model, options = half_done(tmp_path, checkpoint, make_clip, table, skip_broken=True)
    (tmp_path / "pictures" / "2.png").write_bytes(good)
    found = extract_features(model, table, tmp_path / "f.safetensors", **options | {"skip_broken": False})
    assert len(found) == N


def test_nothing_but_broken_images_is_an_error(tmp_path, checkpoint, table):
    for path in (tmp_path / "pictures").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="pairs must have an image that can be read"):
        extract_features(checkpoint, table, tmp_path / "f.safetensors", skip_broken=True, **QUIET)


# --- tables and tensors that are wrong


def test_columns_of_other_names_and_commas(tmp_path, checkpoint, table):
    expected = extract_features(checkpoint, table, tmp_path / "f.safetensors", **QUIET)
    rows = pictures(tmp_path / "pictures")
    commas = write_table(tmp_path / "p.csv", [(c, "x,y", i) for i, c in rows], ("title", "more", "filepath"), ",")
    named = write_table(tmp_path / "q.tsv", [(c, c, i) for i, c in rows], ("text", "caption", "path"))
    for path, options in ((commas, {}), (named, {"image_column": "path", "caption_column": "text"})):
        out = tmp_path / f"{path.stem}.safetensors"
        found = extract_features(checkpoint, path, out, **options, **QUIET)
        assert torch.equal(found.images, expected.images) and torch.equal(found.texts, expected.texts)


def test_quotes_are_read_as_they_are_where_that_is_asked_for(tmp_path, checkpoint, table):
    path = tmp_path / "quotes.tsv"
    path.write_text('image\tcaption\npictures/0.png\t"a cat" on a mat\npictures/1.png\ta "dog\n')
    with pytest.raises(ValueError, match="line 2 cannot be read"):
        extract_features(checkpoint, path, tmp_path / "f.safetensors", **QUIET)
    assert len(extract_features(checkpoint, path, tmp_path / "f.safetensors", quotes=False, **QUIET)) == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "must have a header"),
        ("\n", "must have a header"),
        ("image\tcaption\n", "must have pairs, it has none"),
        ("picture\tcaption\nx\ty\n", "must have a column image or filepath of images, got picture, caption"),
        ("image\ttext\nx\ty\n", "must have a column caption or title of captions"),
        ("image\timage\tcaption\nx\ty\tz\n", "must have one column of images"),
        ("image\tfilepath\tcaption\nx\ty\tz\n", "must have one column of images"),
        ("image\tcaption\nx\n", "line 2 must have 2 columns as the header, got 1"),
        ("image\tcaption\nx\ty\n\nx\ty\tz\n", "line 4 must have 2 columns as the header, got 3"),
        ("image\tcaption\n\ty\n", "line 2 must name an image"),
        ('image\tcaption\nx\t"y\n', "cannot be read"),
        ("image\tcaption\nx\t" + 200_000 * "y" + "\n", "line 2 cannot be read: field larger"),
        (b"image\tcaption\nx\t\xff\xfe\n", "must be UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, checkpoint, text, named):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=named):
        extract_features(checkpoint, path, tmp_path / "f.safetensors", **QUIET)


def spoiled(**values):
    return lambda tensors: tensors | values


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {"input_ids": t["input_ids"]}, "must have input_ids and either pixel_values or images"),
        (lambda t: {"pixel_values": t["pixel_values"]}, "must have input_ids"),
        (spoiled(images=torch.zeros(N, 4, 4, 3, dtype=torch.uint8)), "either pixel_values or images"),
        (spoiled(pixel_values=torch.zeros(N, 3, 8, 8)), r"pixel_values must be \[3, 16, 16\] as the model takes"),
        (spoiled(pixel_values=torch.zeros(N, 1, 16, 16)), r"pixel_values must be floating-point \[n, 3, S, S\]"),
        (spoiled(pixel_values=torch.zeros(N, 3, 16, 16).int()), "pixel_values must be floating-point"),
        (spoiled(input_ids=torch.zeros(N - 1, 9).long()), rf"input_ids must be integers \[{N}, T\]"),
        (spoiled(input_ids=torch.zeros(N, 9)), "input_ids must be integers"),
        (spoiled(input_ids=torch.full((N, 10), 49)), r"input_ids must be \[n, 1 to 9\]"),
        (spoiled(input_ids=torch.full((N, 9), 50)), "input_ids must be from 0 to 49 as the model takes, not so row 0"),
        (spoiled(input_ids=torch.full((N, 9), 7)), "must have the model's end token 49, not so row 0"),
        (spoiled(pixel_values=torch.full((N, 3, 16, 16), torch.nan)), "image features must be finite.*row 0"),
        (lambda t: {name: value[:0] for name, value in t.items()}, "must have pairs"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, make_clip, change, named):
    tensors = change(prepared())
    save_file(tensors, tmp_path / "pairs.safetensors")
    np.savez(tmp_path / "pairs.npz", **{name: value.numpy() for name, value in tensors.items()})
    for kind in ("safetensors", "npz"):
        with pytest.raises(ValueError, match=named):
            extract_features(make_clip(0), tmp_path / f"pairs.{kind}", tmp_path / "f.safetensors", **QUIET)
    assert not (tmp_path / "f.safetensors").exists()


class Poison:
    """Would create a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_file_with_pickled_objects_is_refused_and_nothing_in_it_runs(tmp_path, make_clip):
    np.savez(tmp_path / "pairs.npz", input_ids=np.array([Poison(str(tmp_path / "ran"))], dtype=object))
    with pytest.raises(ValueError, match="pairs.npz cannot be read"):
        extract_features(make_clip(0), tmp_path / "pairs.npz", tmp_path / "f.safetensors", **QUIET)
    for name in ("pairs.npz", "pairs.safetensors"):
        for content in (b"", b"PK\x03\x04" + bytes(40), b"\xff" * 64):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} cannot be read"):
                extract_features(make_clip(0), tmp_path / name, tmp_path / "f.safetensors", **QUIET)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1"),
        ({"workers": 0}, "workers must be"),
        ({"part": 0}, "part must be"),
        ({"device": "abacus"}, "device must be a device"),
        ({"dtype": "int8"}, "dtype must be one of float16, float32"),
        ({"autocast": "int8"}, "autocast must be one of"),
        ({"shard": (2, 2)}, "shard must be i/n with i from 0 to n - 1, got 2/2"),
        ({"shard": (0, 100)}, "shard must be of at most the 23 pairs"),
        ({"tokenizer": "nowhere"}, "tokenizer must be a folder"),
        ({"image_processor": "nowhere"}, "image processor must be a folder"),
        ({"image_column": "x"}, "must have a column x of images"),
    ],
)
def test_a_wrong_option_is_named_before_any_work(tmp_path, checkpoint, table, options, named):
    with pytest.raises(ValueError, match=named):
        extract_features(checkpoint, table, tmp_path / "f.safetensors", **QUIET | options)
    assert not (tmp_path / "f.safetensors.parts").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tmp_path, checkpoint, table):
    with pytest.raises(ValueError, match="device must be one that is here, got cuda"):
        extract_features(checkpoint, table, tmp_path / "f.safetensors", device="cuda", **QUIET)


def test_autocast_computes_in_the_dtype_that_is_asked_for(tmp_path, checkpoint, table):
    exact = extract_features(checkpoint, table, tmp_path / "f.safetensors", dtype="float32", **QUIET)
    found = extract_features(
        checkpoint, table, tmp_path / "g.safetensors", dtype="float32", autocast="bfloat16", **QUIET
    )
    assert found.source.differs_in(exact.source) == ["autocast"]
    for side in ("images", "texts"):
        assert 1e-4 < (getattr(found, side) - getattr(exact, side)).abs().max() < 0.1


def test_a_model_in_half_precision_takes_images(tmp_path, make_clip, checkpoint, table):
    exact = extract_features(checkpoint, table, tmp_path / "f.safetensors", **QUIET)
    half = make_clip(0).to(torch.bfloat16)
    found = extract_features(half, table, tmp_path / "g.safetensors", tokenizer=checkpoint, **QUIET)
    torch.testing.assert_close(found.images, exact.images, rtol=0, atol=0.1)


def test_a_model_without_a_tokenizer_needs_one(tmp_path, make_clip, table):
    make_clip(0).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="a tokenizer must be given"):
        extract_features(tmp_path / "bare", table, tmp_path / "f.safetensors", **QUIET)


# --- the command


def run(*arguments):
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, ["mcl", *map(str, arguments)])


def test_the_commands_go_from_a_checkpoint_to_labels(tmp_path, checkpoint, table):
    out, labels = tmp_path / "f.safetensors", tmp_path / "labels.safetensors"
    result = run("extract", "--model", checkpoint, "--pairs", table, "--out", out, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert f"{N} pairs" in result.output
    expected = extract_features(checkpoint, table, tmp_path / "g.safetensors", dtype="float32", **QUIET)
    assert same(Features.load(out), expected)
    result = run("cluster", "--features", out, "--clusters", 2, "--out", labels)
    assert result.exit_code == 0, result.output
    assert load_file(labels)["labels"].tolist() == cluster_stages([expected], 2).labels.tolist()
    shard = tmp_path / "shard.safetensors"
    assert run("extract", "--model", checkpoint, "--pairs", table, "--out", shard, "--shard", "1/2").exit_code == 0
    assert Features.load(shard).index.tolist() == list(range(11, 23))


def test_what_the_command_cannot_use_is_said_without_a_traceback(tmp_path, checkpoint, table):
    out = tmp_path / "f.safetensors"
    spoil(tmp_path / "pictures")
    for options, code, named in [
        (["--model", tmp_path / "none", "--pairs", table], 1, "none"),
        (["--model", tmp_path / "pictures", "--pairs", table], 1, "must be a folder with"),
        (["--model", checkpoint, "--pairs", tmp_path / "none.tsv"], 1, "none.tsv"),
        (["--model", checkpoint, "--pairs", tmp_path / "none.npz"], 1, "none.npz"),
        (["--model", checkpoint, "--pairs", tmp_path], 1, "pairs must be a .tsv"),
        (["--model", checkpoint, "--pairs", table], 1, "row 2 (line 4"),
        (["--model", checkpoint, "--pairs", table, "--shard", "2/2"], 2, "--shard must be i/n"),
        (["--model", checkpoint, "--pairs", table, "--shard", "x"], 2, "--shard must be i/n"),
    ]:
        result = run("extract", *options, "--out", out)
        assert result.exit_code == code and named in result.output, result.output
        assert not out.exists()
    result = run("extract", "--model", checkpoint, "--pairs", table, "--out", out, "--skip-broken")
    assert result.exit_code == 0 and "6 pairs are left out" in result.output
