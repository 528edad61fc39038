"""Cached text encoder outputs: their file format, their variants, and the captions that they are made of."""

import io
import os
from dataclasses import replace

import numpy as np
import pytest

from sdxl_trainer.data.formats.manifest import TextIdentity
from sdxl_trainer.data.formats.shards import ShardWriter, iterate_members
from sdxl_trainer.data.formats.text_cache import (
    read_empty_text,
    read_text_state,
    verify_text_state,
    write_text_state,
)
from sdxl_trainer.data.formats.text_outputs import (
    BadTextError,
    TextOutputs,
    pack_text,
    parse_text_outputs,
    read_text_variant,
)
from sdxl_trainer.data.text.captions import CaptionSettings
from sdxl_trainer.data.text.variants import CaptionVariants, hash_captions, list_random_settings

IDENTITY = TextIdentity(
    encoder_sha256="1",
    encoder_2_sha256="2",
    tokenizer_sha256="3",
    tokenizer_2_sha256="4",
    max_tokens=75,
    dtype="float32",
)
TAGS = {"key": "a", "caption": "one, two, three, four, five, six"}


def make_outputs(number: int, length: int = 77) -> TextOutputs:
    rng = np.random.default_rng(number)
    return TextOutputs(*(rng.standard_normal(shape, np.float32) for shape in ((length, 12), (length, 20), (20,))))


def is_same(left: TextOutputs, right: TextOutputs, atol: float = 0) -> bool:
    pairs = zip(vars(left).values(), vars(right).values(), strict=True)
    return all(a.shape == b.shape and np.allclose(a, b, rtol=atol, atol=atol) for a, b in pairs)


def test_outputs_of_very_long_captions_are_read(tmp_path):
    """Arrays larger than a compressed one may be, in one file with a variant."""
    outputs = TextOutputs(*(np.ones(shape, np.float32) for shape in ((7502, 500), (7502, 600), (600,))))
    content = pack_text([outputs, outputs])
    (tmp_path / "a.npz").write_bytes(content)
    assert is_same(parse_text_outputs(content, 2)[1], outputs)
    assert is_same(read_text_variant(tmp_path / "a.npz", None, len(content), 1, 2), outputs)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("variants", [1, 3])
def test_each_variant_is_read_back_from_file_and_shard(tmp_path, dtype, atol, variants):
    outputs = [make_outputs(number) for number in range(variants)]
    content = pack_text(outputs, dtype)
    (tmp_path / "a_te_outputs.npz").write_bytes(content)
    writer = ShardWriter(tmp_path / "s.tar")
    writer.append("first", b"{}", b"other latents", pack_text(outputs[::-1], dtype))
    place = writer.append("a", b"{}", b"latents", content)
    writer.close()
    for number, expected in enumerate(outputs):
        plain = read_text_variant(tmp_path / "a_te_outputs.npz", None, len(content), number, variants)
        packed = read_text_variant(tmp_path / "s.tar", place.text_offset, len(content), number, variants)
        assert is_same(plain, expected, atol) and is_same(packed, plain)
    assert all(is_same(a, b, atol) for a, b in zip(parse_text_outputs(content, variants), outputs, strict=True))
    members = [(key, kind) for key, kind, _, _ in iterate_members(tmp_path / "s.tar")]
    assert members == [(key, kind) for key in ("first", "a") for kind in ("json", "npz", "te.npz")]


def test_kohya_finds_the_first_variant():
    first, second = make_outputs(0, 227), make_outputs(1, 227)
    with np.load(io.BytesIO(pack_text([first, second])), allow_pickle=False) as arrays:
        assert is_same(TextOutputs(arrays["hidden_state1"], arrays["hidden_state2"], arrays["pool2"]), first)
        assert arrays["hidden_state1"].dtype == np.float32 and arrays["hidden_state1_v1"].shape == (227, 12)
        assert len(arrays.files) == 6


@pytest.mark.parametrize("variants", [1, 2])
def test_errors_name_the_fault_of_a_file(tmp_path, variants):
    outputs = [make_outputs(number) for number in range(variants)]
    content = bytearray(pack_text(outputs))
    path = tmp_path / "a.npz"

    def read() -> None:
        read_text_variant(path, None, len(content), variants - 1, variants)

    with pytest.raises(BadTextError, match="cannot be read: No such file"):
        read()
    path.write_bytes(content[:-30])
    with pytest.raises(BadTextError, match="npz"):
        read()
    content[3 * len(content) // 4] ^= 1  # among the values of the last variant
    path.write_bytes(content)
    with pytest.raises(BadTextError, match="CRC"):
        read()
    path.write_bytes(pack_text([replace(each, pooled=np.full(20, np.nan)) for each in outputs]))
    with pytest.raises(BadTextError, match="pool2.*not finite"):
        read()
    np.savez(path, hidden_state1=np.zeros((77, 2)), pool2=np.zeros(3))
    with pytest.raises(BadTextError, match="has no array of floats `hidden_state2"):
        parse_text_outputs(path.read_bytes(), variants)


@pytest.mark.parametrize("variants", [1, 2])
def test_every_flipped_byte_of_a_file_is_refused_or_harmless(tmp_path, variants):
    rng = np.random.default_rng(0)
    shapes = ((1, 2), (1, 3), (3,))
    outputs = [TextOutputs(*(rng.standard_normal(shape, np.float32) for shape in shapes)) for _ in range(variants)]
    path, content = tmp_path / "a.npz", bytearray(pack_text(outputs))
    for place in range(len(content)):
        for mask in (0x01, 0x80, 0xFF):
            content[place] ^= mask
            path.write_bytes(content)
            try:
                found = read_text_variant(path, None, len(content), variants - 1, variants)
            except BadTextError:
                pass
            else:
                assert is_same(found, outputs[-1]), place
            content[place] ^= mask


def test_variants_are_keyed_to_the_sample_and_ignore_dropout():
    settings = CaptionSettings(shuffle=True, dropout_rate=0.9, dropout_every_epochs=1, keep_tokens=1)
    shaped = CaptionVariants(settings, 8).build(TAGS)
    assert len(shaped) == 8 and len(set(shaped)) > 4
    assert all(sorted(text.split(", ")) == sorted(TAGS["caption"].split(", ")) for text in shaped)
    assert all(text.startswith("one") for text in shaped)
    assert shaped == CaptionVariants(replace(settings, dropout_rate=0.0), 8).build(TAGS)
    assert shaped[:3] == CaptionVariants(settings, 3).build(TAGS)  # more variants keep the first ones
    assert shaped != CaptionVariants(settings, 8).build({**TAGS, "key": "b"})
    assert CaptionVariants(CaptionSettings(), 8).build(TAGS) == (TAGS["caption"],)  # equal variants are kept once
    assert hash_captions(shaped) != hash_captions(shaped[:7])


def test_random_caption_settings_are_listed():
    assert (
        list_random_settings(CaptionSettings(dropout_rate=0.5, keep_tokens=2, prefix="x", replacements={"a": "b"}))
        == []
    )
    random = CaptionSettings(shuffle=True, wildcards=True, tag_dropout_rate=0.1, replacements={"a": ["b", "c"]})
    assert list_random_settings(CaptionSettings(), has_both_texts=True) == ["source"]
    for certain in (CaptionSettings(description_rate=1.0), CaptionSettings(source="join")):
        assert list_random_settings(certain, has_both_texts=True) == []
    assert list_random_settings(random) == ["shuffle", "tag_dropout_rate", "wildcards", "replacements"]


def test_every_flipped_byte_of_the_text_state_is_found(tmp_path):
    assert verify_text_state(tmp_path) is None and read_text_state(tmp_path) is None
    write_text_state(tmp_path, IDENTITY, ["correct", ["/m", 1, 2]], pack_text([make_outputs(0, 3)]))
    state = read_text_state(tmp_path)
    assert state is not None and state.identity == IDENTITY and state.sources == ["correct", ["/m", 1, 2]]
    assert is_same(read_empty_text(tmp_path, state), make_outputs(0, 3)) and verify_text_state(tmp_path) is None
    for name in ("text.json", "manifest/empty_te_outputs.npz"):
        whole = (tmp_path / name).read_bytes()
        for place in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            assert verify_text_state(tmp_path) is not None, (name, place)
        (tmp_path / name).write_bytes(whole)
    os.unlink(tmp_path / "manifest" / "empty_te_outputs.npz")
    assert "cannot be read" in str(verify_text_state(tmp_path))
