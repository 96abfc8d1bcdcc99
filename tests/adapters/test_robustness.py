"""Files from anyone: whatever is in an adapter file, it is loaded, or refused with a reason, and the model is whole.

Every layout's valid file is damaged in ways that have a name, and in 2,000 random ways from fixed seeds. The models
have a layer of each kind and few weights, so that the files take seconds.
"""

import copy
import json
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from helpers import lora
from helpers.adapters import layouts
from helpers.adapters.configuration import AdapterError
from helpers.adapters.loading import load_adapter

TARGETS = ["conv_in", "to_q", "to_out.0"]
LAYOUTS = ("diffusers", "kohya", "peft", "old")
RANK = 2
# what an error message tells the reader to do
ADVICE = re.compile(
    r"again|ask the author|earlier checkpoint|Is (this|the) (an )?adapter for|Load the base model|It belongs to"
)


class Unet(nn.Module):
    """A convolution and two linear layers, under names of Stable Diffusion's U-Net."""

    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, width, 3)
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(width, 6), "to_out": nn.ModuleList([nn.Linear(6, width)])})

    def forward(self):
        x = self.conv_in(torch.linspace(-1, 1, 75).view(1, 3, 5, 5)).mean((2, 3))
        return self.attn1["to_out"][0](torch.tanh(self.attn1["to_q"](x)))


class TextEncoder(nn.Module):
    """One linear layer, under a name of CLIP's text encoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        layer = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(3, 5)})})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([layer])})

    def forward(self):
        return self.encoder["layers"][0]["mlp"]["fc1"](torch.ones(1, 3))


TEXT_LAYER = "encoder.layers.0.mlp.fc1"


def state_of(models):
    """All that a refused file has to leave as it was."""
    with torch.no_grad():
        return (
            [(name, id(module), module.training) for model in models for name, module in model.named_modules()],
            [(id(p), p.requires_grad, p.tolist()) for model in models for p in model.parameters()],
            [model().tolist() for model in models],
            torch.get_rng_state().tolist(),
        )


# ---- valid files, and files with something changed ----


@dataclass
class File:
    """An adapter file that can be changed part by part: its tensors, the header's texts and PEFT's configuration."""

    layout: str
    tensors: dict[str, torch.Tensor]
    header: dict[str, str]
    config: dict

    def key(self, layer: str, part: str) -> str:
        """What this file calls a tensor of a layer."""
        if self.layout == "old" and layer == "unet.attn1.to_q":
            return f"attn1.processor.to_q_lora.{'down' if 'A' in part else 'up'}.weight"
        return layouts.key_of(self.layout, layer, part)

    def data(self) -> bytes:
        header = dict(self.header)
        if self.layout == "diffusers":
            header["lora_adapter_metadata"] = json.dumps({f"unet.{key}": value for key, value in self.config.items()})
        return save({key: value.contiguous() for key, value in self.tensors.items()}, metadata=header)

    def write(self, folder: Path, data: bytes | None = None) -> Path:
        """The file on disk, and beside it PEFT's configuration."""
        folder.mkdir(exist_ok=True)
        name = "adapter_model.safetensors" if self.layout == "peft" else "pytorch_lora_weights.safetensors"
        (folder / name).write_bytes(self.data() if data is None else data)
        if self.layout == "peft":
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder / name


def valid(layout, dora=False, middle=False):
    """A file of an adapter of random numbers, for a U-Net and a text encoder. middle: a convolution in three parts."""
    torch.manual_seed(5)
    shapes = {"unet.conv_in": (3, 4, 3), "unet.attn1.to_q": (4, 6, None), "unet.attn1.to_out.0": (6, 4, None)}
    shapes[f"text_encoder.{TEXT_LAYER}"] = (3, 5, None)
    config = {"r": RANK, "lora_alpha": 3.0, "alpha_pattern": {"to_q": 1.5}, "use_rslora": False, "use_dora": dora}
    file = File(layout, {}, {"format": "pt"}, config | {"lora_dropout": 0.0, "target_modules": TARGETS})
    for layer, (inputs, outputs, kernel) in shapes.items():
        size, ones = ([kernel, kernel], [1, 1]) if kernel else ([], [])
        file.tensors[file.key(layer, "lora_A.weight")] = torch.randn(RANK, inputs, *(ones if middle else size))
        if middle and kernel:
            file.tensors[file.key(layer, "lora_mid.weight")] = torch.randn(RANK, RANK, *size)
        file.tensors[file.key(layer, "lora_B.weight")] = torch.randn(outputs, RANK, *ones)
        if dora:
            column = [outputs, 1, *ones]
            magnitude = torch.rand(column if layout == "kohya" else [1, outputs, 1, 1] if kernel else [outputs])
            file.tensors[file.key(layer, "lora_magnitude_vector")] = magnitude
        if layout == "kohya":
            file.tensors[file.key(layer, "alpha")] = torch.tensor(3.0)
    return file


def refusal(path, models=None, named=None):
    """The message with which a file is refused; it names the file, says what to do, and the models are whole.

    named: the path that the message names, if it is another.
    """
    models = models or (Unet(), TextEncoder())
    before = state_of(models)
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, *models)
    assert state_of(models) == before, "a refused file must leave the model and the random state alone"
    message = str(caught.value)
    assert str(named or path) in message, "the message must name the file"
    assert ADVICE.search(message), f"the message must say what to do: {message}"
    return message


@pytest.mark.parametrize(
    "layout, dora, middle",
    [
        *((layout, False, False) for layout in LAYOUTS),
        ("diffusers", True, False),
        ("peft", True, False),
        ("kohya", True, False),
        ("kohya", False, True),
        ("kohya", True, True),
    ],
)
def test_the_undamaged_file_loads(tmp_path, layout, dora, middle):
    models = Unet(), TextEncoder()
    before = [model() for model in models]
    found = load_adapter(valid(layout, dora, middle).write(tmp_path), *models)
    assert found["layout"] == layout and len(lora.lora_layers(models[0])) == 3 and len(lora.lora_layers(models[1])) == 1
    assert not any(torch.allclose(model(), was, atol=1e-3) for model, was in zip(models, before, strict=True))


# ---- damaged bytes ----


def split(data):
    """A safetensors file's header, as JSON, and the bytes behind it."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


PICKLE = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "truncated in the header": lambda data: data[:60],
    "truncated in the tensors": lambda data: data[:-5],
    "longer than its tensors": lambda data: data + b"\0",
    "pickle": lambda data: PICKLE,
    "zip archive of PyTorch": lambda data: b"PK\x03\x04" + bytes(60),
    "text": lambda data: b"<html>404: Not Found</html>",
    "absurd header length": lambda data: b"\xff" * 8 + data[8:],
    "header longer than the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "header of 200 MB": lambda data: struct.pack("<Q", 200_000_000) + data[8:],
    "header of no bytes": lambda data: bytes(8) + data[8:],
    "header with a flipped bit": lambda data: data[:8] + bytes([data[8] ^ 1]) + data[9:],
    "header is not JSON": lambda data: join(b"{'a': 1}" + b" " * 8, split(data)[1]),
    "header is a list": lambda data: join(b"[1, 2]", b""),
    "header is not UTF-8": lambda data: join(b'{"\xff\xfe": 1}', b""),
    "header nested deep": lambda data: join(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b""),
    "offsets swapped": lambda data: with_entry(data, lambda entry: entry["data_offsets"].reverse()),
    "offsets beyond the file": lambda data: with_entry(data, lambda entry: entry.update(data_offsets=[0, 10**15])),
    "negative offset": lambda data: with_entry(data, lambda entry: entry.update(data_offsets=[-4, 28])),
    "shape larger than the bytes": lambda data: with_entry(data, lambda entry: entry["shape"].append(7)),
    "shape overflows": lambda data: with_entry(data, lambda entry: entry.update(shape=[2**33, 2**33])),
    "unknown dtype": lambda data: with_entry(data, lambda entry: entry.update(dtype="F33")),
    "dtype is a number": lambda data: with_entry(data, lambda entry: entry.update(dtype=32)),
    "no dtype": lambda data: with_entry(data, lambda entry: entry.pop("dtype")),
    "metadata is no text": lambda data: join(split(data)[0] | {"__metadata__": {"format": 1}}, split(data)[1]),
}


def with_entry(data, change):
    """The file with its first tensor's entry in the header changed."""
    header, body = split(data)
    change(next(entry for key, entry in header.items() if key != "__metadata__"))
    return join(header, body)


@pytest.mark.parametrize("damage", BYTES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_bytes_are_refused(tmp_path, layout, damage):
    file = valid(layout)
    assert "not a readable safetensors file" in refusal(file.write(tmp_path, BYTES[damage](file.data())))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickled_weights_are_not_opened(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(valid("diffusers").tensors, path)
    assert "can run code" in refusal(path)


def test_a_float4_tensor_is_refused(tmp_path):
    """safetensors knows the dtype, and PyTorch can do nothing with it."""
    file = valid("diffusers")
    key = next(iter(split(file.data())[0].keys() - {"__metadata__"}))
    header, body = split(file.data())
    shape = header[key]["shape"]
    header[key] |= {"dtype": "F4", "shape": [*shape[:-1], shape[-1] * 8]}
    assert key in refusal(file.write(tmp_path, join(header, body)))


# ---- tensors that make no adapter, or another model's ----

LAYER = "unet.attn1.to_q"


def edit(file, part, change):
    """Replace one tensor of the layer by change(tensor); returns its key."""
    key = file.key(LAYER, part)
    file.tensors[key] = change(file.tensors[key])
    return key


def drop(file, part):
    key = file.key(LAYER, part)
    del file.tensors[key]
    return key


def add(file, key, value):
    file.tensors[key] = value
    return key


def add_layer(file, layer):
    """A layer more, complete with A and B."""
    keys = [layouts.key_of(file.layout, layer, part) for part in ("lora_A.weight", "lora_B.weight")]
    file.tensors |= dict(zip(keys, (torch.ones(RANK, 4), torch.ones(6, RANK)), strict=True))
    return keys[0]


def swap(file):
    """A under B's name and B under A's."""
    a, b = file.key(LAYER, "lora_A.weight"), file.key(LAYER, "lora_B.weight")
    file.tensors[a], file.tensors[b] = file.tensors[b], file.tensors[a]
    return a


def spoil(value):
    """Put one odd number into a tensor."""
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


A, B = "lora_A.weight", "lora_B.weight"
TENSORS: dict[str, Callable[[File], str]] = {
    "no A": lambda file: drop(file, A),
    "no B": lambda file: drop(file, B),
    "A wider": lambda file: edit(file, A, lambda t: torch.ones(RANK, 5)),
    "A for a convolution": lambda file: edit(file, A, lambda t: t[:, :, None, None]),
    "B longer": lambda file: edit(file, B, lambda t: torch.ones(7, RANK)),
    "B of another rank": lambda file: edit(file, B, lambda t: torch.ones(6, RANK + 1)),
    "A and B swapped": swap,
    "A of rank 0": lambda file: edit(file, A, lambda t: t[:0]),
    "B of rank 0": lambda file: edit(file, B, lambda t: t[:, :0]),
    "A is one number": lambda file: edit(file, A, lambda t: t.sum()),
    "A has three dimensions": lambda file: edit(file, A, lambda t: t[None]),
    "A has NaN": lambda file: edit(file, A, spoil(torch.nan)),
    "B has infinity": lambda file: edit(file, B, spoil(torch.inf)),
    "B has minus infinity in half precision": lambda file: edit(file, B, lambda t: spoil(-torch.inf)(t.half())),
    "A is int64": lambda file: edit(file, A, lambda t: t.long()),
    "B is int8": lambda file: edit(file, B, lambda t: t.to(torch.int8)),
    "A is boolean": lambda file: edit(file, A, lambda t: t > 0),
    "A is complex": lambda file: edit(file, A, lambda t: t.to(torch.complex64)),
    "a layer of no model": lambda file: add_layer(file, "unet.mid_block.proj_in"),
    "a layer of another kind of module": lambda file: add_layer(file, "unet.attn1"),
    "a key of no layout": lambda file: add(file, "optimizer.state.step", torch.ones(1)),
    "a key of Stable Diffusion XL": lambda file: add(
        file, "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", torch.ones(1)
    ),
    "a key of LyCORIS": lambda file: add(file, "lora_unet_attn1_to_q.hada_w1_a", torch.ones(1)),
}


@pytest.mark.parametrize("fault", TENSORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_make_no_adapter_are_refused_by_name(tmp_path, layout, fault):
    file = valid(layout)
    key = TENSORS[fault](file)
    assert f"'{key}'" in refusal(file.write(tmp_path)), "the message must name the key as the file has it"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_for_a_wider_model_is_refused(tmp_path, layout):
    file = valid(layout)
    message = refusal(file.write(tmp_path), (Unet(width=6), TextEncoder()))
    assert "has shape" in message and any(f"'{key}'" in message for key in file.tensors)


ALPHAS = {
    "several elements": torch.ones(2),
    "no elements": torch.ones(0),
    "NaN": torch.tensor(torch.nan),
    "infinite": torch.tensor(torch.inf),
    "boolean": torch.tensor(True),
}


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_alpha_of_kohya_that_is_no_number_is_refused(tmp_path, alpha):
    file = valid("kohya")
    key = edit(file, "alpha", lambda _: ALPHAS[alpha])
    assert f"'{key}'" in refusal(file.write(tmp_path))


def test_an_alpha_without_a_layer_is_refused(tmp_path):
    file = valid("kohya")
    file.tensors["lora_unet_mid_block_proj_in.alpha"] = torch.tensor(1.0)
    assert "missing key 'lora_unet_mid_block_proj_in.lora_down.weight'" in refusal(file.write(tmp_path))


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t * torch.nan, lambda t: t[None], lambda t: t.long()])
@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
def test_a_magnitude_of_dora_that_does_not_fit_is_refused(tmp_path, layout, change):
    file = valid(layout, dora=True)
    key = edit(file, "lora_magnitude_vector", change)
    assert f"'{key}'" in refusal(file.write(tmp_path))


@pytest.mark.parametrize("change", [lambda t: t[:1], lambda t: t[0], lambda t: t * torch.inf, lambda t: t[:, :, 0, 0]])
def test_a_middle_that_does_not_fit_is_refused(tmp_path, change):
    file = valid("kohya", middle=True)
    key = file.key("unet.conv_in", "lora_mid.weight")
    file.tensors[key] = change(file.tensors[key])
    assert f"'{key}'" in refusal(file.write(tmp_path))


def test_a_middle_without_its_ends_is_refused(tmp_path):
    file = valid("kohya", middle=True)
    assert f"'{drop(file, 'lora_A.weight')}'" in refusal(file.write(tmp_path))


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_dora_without_a_magnitude_is_refused(tmp_path, layout):
    file = valid(layout, dora=True)
    assert f"'{drop(file, 'lora_magnitude_vector')}'" in refusal(file.write(tmp_path))


DUPLICATES = {
    "diffusers": (f"text_encoder.text_model.{TEXT_LAYER}.lora_A.weight", f"text_encoder.{TEXT_LAYER}.lora_A.weight"),
    "kohya": (
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te_encoder_layers_0_mlp_fc1.lora_down.weight",
    ),
    "peft": (f"base_model.model.text_model.{TEXT_LAYER}.lora_A.weight", f"base_model.model.{TEXT_LAYER}.lora_A.weight"),
    "old": ("attn1.processor.to_q_lora.down.weight", "unet.attn1.to_q.lora.down.weight"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_keys_for_one_tensor_are_refused(tmp_path, layout):
    file, (one, other) = valid(layout), DUPLICATES[layout]
    add(file, other, file.tensors[one].clone())
    message = refusal(file.write(tmp_path))
    assert "names the same tensor as" in message and f"'{one}'" in message and f"'{other}'" in message


def test_a_key_that_the_header_has_twice_is_refused_or_read_once(tmp_path):
    """JSON allows a name twice; which of the two counts is the reader's choice, a crash is not."""
    file = valid("diffusers")
    header, body = split(file.data())
    text = json.dumps(header).encode()
    key = file.key(LAYER, A)
    text = text[:-1] + b", " + json.dumps({key: header[key]}).encode()[1:]
    models = Unet(), TextEncoder()
    before = state_of(models)
    try:
        load_adapter(file.write(tmp_path, join(text, body)), *models)
    except AdapterError:
        assert state_of(models) == before


# ---- configurations ----

DEEP = json.loads("[" * 300 + "]" * 300)
CONFIGS = [
    ("lora_alpha", 10**400),
    ("lora_alpha", -(10**400)),
    ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")),
    ("lora_alpha", "8"),
    ("lora_alpha", True),
    ("lora_alpha", [8]),
    ("lora_alpha", DEEP),
    ("alpha_pattern", [1]),
    ("alpha_pattern", "to_q"),
    ("alpha_pattern", {"(": 1}),
    ("alpha_pattern", {"(?i)x": 1}),
    ("alpha_pattern", {"(?<=a*)b": 1}),
    ("alpha_pattern", {"a{99999999999}": 1}),
    ("alpha_pattern", {"(" * 5000 + ")" * 5000: 1}),
    ("alpha_pattern", {"to_q": "1"}),
    ("alpha_pattern", {"to_q": None}),
    ("alpha_pattern", {"to_q": 10**400}),
    ("alpha_pattern", {"to_q": DEEP}),
    ("use_rslora", "yes"),
    ("use_rslora", 1),
    ("use_dora", "no"),
    ("lora_dropout", 1.0),
    ("lora_dropout", -0.1),
    ("lora_dropout", "0"),
    ("lora_dropout", 10**400),
    ("target_modules", 3),
    ("target_modules", "("),
    ("target_modules", "(?<=a*)b"),
    ("target_modules", ["to_q", 1]),
    ("target_modules", {"to_q": 1}),
    ("target_modules", DEEP),
]


@pytest.mark.parametrize("field, value", CONFIGS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path, layout, field, value):
    file = valid(layout)
    file.config[field] = value
    message = refusal(file.write(tmp_path), named=tmp_path)
    assert field in message and "makes no sense" in message
    assert len(message) < 2000, "a message is read by a person"


def test_a_fault_in_pefts_configuration_is_not_blamed_on_the_weights(tmp_path):
    file = valid("peft")
    file.config["use_rslora"] = "yes"
    refusal(file.write(tmp_path), named=tmp_path / "adapter_config.json")


TEXTS = {
    "not closed": "{",
    "a list": "[]",
    "a number": "3",
    "not JSON": "{'r': 2}",
    "an integer of 5,000 digits": '{"unet.r": ' + "1" * 5000 + "}",
    "nested deep": "[" * 100_000,
    "nested deep and closed": '{"unet.r":' * 100_000 + "1" + "}" * 100_000,
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("entry", ["lora_adapter_metadata", "provenance"])
def test_a_text_in_the_header_that_is_no_json_object_is_refused(tmp_path, entry, text):
    file = valid("diffusers")
    header, body = split(file.data())
    header["__metadata__"][entry] = TEXTS[text]
    message = refusal(file.write(tmp_path, join(header, body)))
    assert f"'{entry}' is not " in message and len(message) < 2000


@pytest.mark.parametrize("text", [*TEXTS, "no UTF-8"])
def test_a_configuration_of_peft_that_is_no_json_object_is_refused(tmp_path, text):
    path = valid("peft").write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{" if text == "no UTF-8" else TEXTS[text].encode())
    assert " is not " in refusal(path, named=tmp_path / "adapter_config.json")


# ---- 2,000 files, damaged at random ----

ODD = [None, True, -1, 0, 1.5, 10**400, 1e308, "", "(", "8", [], [[]], {}, {"to_q": 4}, {"(": 1}, "x" * 500, ["to_q"]]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I32", "U8", "BOOL", "C64", "F33"]
BITS = {"F64": 64, "F16": 16, "BF16": 16, "F4": 4, "I64": 64, "U8": 8, "BOOL": 8, "C64": 64}


def change_bytes(rng, data):
    """Flip, cut, insert or delete some bytes, a third of the time within the header."""
    border = min(len(data), 8 + struct.unpack("<Q", data[:8])[0])
    at = rng.choice([rng.randrange(border), rng.randrange(border - 1, len(data)), rng.randrange(border - 1, len(data))])
    size = rng.randint(1, 8)
    kind = rng.choice(["flip", "flip", "flip", "flip", "flip", "cut", "insert", "delete"])
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    return data[:at] + (rng.randbytes(size) if kind == "insert" else b"") + data[at + (kind == "delete") * size :]


def change_header(rng, data):
    """Change one entry of the header: a tensor's dtype, shape, place or name, or a text."""
    header, body = split(data)
    texts = header.setdefault("__metadata__", {})
    key = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[key]
    kind = rng.choice(["dtype", "same bytes", "same bytes", "shape", "offsets", "odd", "drop", "rename", "text"])
    if kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == "same bytes":  # another dtype, and the shape that goes with it
        entry["dtype"] = rng.choice(DTYPES)
        if entry["shape"]:
            entry["shape"][-1] = entry["shape"][-1] * 32 // BITS.get(entry["dtype"], 32)
    elif kind == "shape":
        entry["shape"] = rng.choice([entry["shape"][::-1], [1, *entry["shape"]], [2**40], [0], [-1], []])
    elif kind == "offsets":
        entry["data_offsets"][rng.randrange(2)] += rng.choice([-8, -4, 4, 8, 2**62])
    elif kind == "odd":
        entry[rng.choice(list(entry))] = rng.choice(ODD)
    elif kind == "drop":
        del header[key]
    elif kind == "rename":
        header[rng.choice(["x", key + "x", key.replace("to_q", "to_k"), key.replace("down", "up")])] = header.pop(key)
    else:
        texts[rng.choice(["lora_adapter_metadata", "provenance", "format"])] = rng.choice(
            ["", "{", "[]", "{}", '{"a": 1}', "3"]
        )
    return join(header, body)


def change_tensor(rng, file):
    """Change one tensor so that the file stays well-formed."""
    key = rng.choice(list(file.tensors))
    tensor = file.tensors[key]
    kind = rng.choice(["number", "number", "dtype", "dtype", "transpose", "slice", "drop", "double", "swap", "flat"])
    if kind == "number":
        file.tensors[key] = tensor.clone()
        numbers = file.tensors[key].view(-1)
        numbers[rng.randrange(len(numbers))] = rng.choice([torch.nan, torch.inf, 0.0, -1e30, 1e-40, 7.0])
    elif kind == "dtype":
        file.tensors[key] = tensor.to(
            rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.float8_e5m2])
        )
    elif kind == "transpose":
        file.tensors[key] = tensor.mT if tensor.ndim > 1 else tensor
    elif kind == "slice":
        file.tensors[key] = tensor[: rng.randrange(len(tensor))] if tensor.ndim else tensor
    elif kind == "drop":
        del file.tensors[key]
    elif kind == "double":
        file.tensors[key.replace("text_model.", "").replace("to_out", "to_q") + rng.choice(["", "x"])] = tensor.clone()
    elif kind == "swap":
        other = rng.choice(list(file.tensors))
        file.tensors[key], file.tensors[other] = file.tensors[other], file.tensors[key]
    else:
        file.tensors[key] = tensor.flatten()


def change_config(rng, file):
    """Give one field of the configuration an odd value, or an odd value inside."""
    field = rng.choice([*file.config, "exclude_modules", "rank_pattern"])
    if field == "alpha_pattern" and rng.random() < 0.7:
        file.config[field] = {rng.choice(["to_q", "(", "", ".*", "(?i)x", "^conv_in"]): rng.choice(ODD)}
    else:
        file.config[field] = rng.choice(ODD)


def mutant(rng, file):
    """A copy of the file with one or two changes: what is in it first, then how it is stored. And the bytes of it."""
    file = copy.deepcopy(file)
    weights = [3, 2 if file.layout in ("diffusers", "peft") else 0, 5, 4]  # the other layouts have no configuration
    kinds = sorted(rng.choices("tensor config header bytes".split(), weights, k=rng.choice([1, 1, 1, 2])))
    for _ in range(kinds.count("tensor")):
        change_tensor(rng, file)
    for _ in range(kinds.count("config")):
        change_config(rng, file)
    data = file.data()
    if "header" in kinds:
        data = change_header(rng, data)
    for _ in range(kinds.count("bytes")):
        data = change_bytes(rng, data) if len(data) > 16 else data
    return file, data


@pytest.mark.parametrize("layout", [*LAYOUTS, "diffusers, DoRA", "kohya, DoRA", "kohya, in three parts"])
def test_a_file_changed_at_random_loads_or_is_refused(tmp_path, layout):
    rng = random.Random(f"mutations of {layout}")
    original = valid(layout.split(",")[0], "DoRA" in layout, "three" in layout)
    models = Unet(), TextEncoder()
    before = state_of(models)
    loaded = 0
    for number in range(400):
        file, data = mutant(rng, original)
        path = file.write(tmp_path, data)
        try:
            load_adapter(path, *models)
        except AdapterError as error:
            assert str(tmp_path) in str(error), f"file {number}"
        except Exception as error:
            error.add_note(f"{layout}, file {number} of the seed; configuration {file.config}; bytes {data!r}")
            raise
        else:
            loaded += 1
            layers = [layer for model in models for layer in lora.lora_layers(model).values()]
            assert layers and all(p.isfinite().all() for layer in layers for p in layer.parameters()), f"file {number}"
            for model in models:
                lora.remove(model)
                model.requires_grad_(True)
        assert state_of(models) == before, f"{layout}, file {number} changed the model"
    assert 40 <= loaded < 200, "the changes have to be neither too weak nor too strong to test anything"
