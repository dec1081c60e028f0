"""Long contexts: every way to decode does what it says, its bytes are the chapters', and the figure shows it."""

import json
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

from chapters import contents, long_context, report
from chapters.lab import Lab
from chapters.long_context import Record, Row, measure
from chapters.shared import decode_methods
from chapters.shared.decode_methods import BIGBIRD, LSH, METHODS

BY_NAME = {method.name: method for method in METHODS}
DECODING = [method for method in METHODS if not method.cannot]
PLAIN, LONG = METHODS[0].name, [24, 160]


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_methods, "SPAN_STEPS", 2)
        patch.setattr(long_context, "TEXTS", 1)
        patch.setattr(long_context, "STEP", 128)
        yield


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab()


@pytest.fixture(scope="module")
def found(lab) -> dict[str, Row]:
    return {method.name: measure(method, lab, LONG) for method in METHODS}


@pytest.fixture(scope="module")
def record(found) -> Record:
    return Record(LONG, 512, list(found.values()), "2026-01-01", {"python": "3", "torch": "2"})


@pytest.fixture(scope="module")
def drawn(record) -> Figure:
    return long_context.picture(record)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(long_context, "KEPT", tmp_path / "long_context.json")
    return tmp_path / "long_context.json"


@pytest.mark.parametrize("method", [m for m in DECODING if m.trained != "rounded" and m.chapter != "lsh"])
def test_step_by_step_is_what_one_pass_gives(method, lab):
    model, cache = method.make(lab, 2, 150)
    tokens = lab.calibration(count=2, length=150)
    with torch.no_grad():
        steps = [model(part, cache) for part in (tokens[:, :140], *tokens[:, 140:].split(1, dim=1))]
        assert len(cache) == 150
        torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), rtol=1e-3, atol=1e-3)


def test_every_attention_chapter_that_decodes_is_there():
    assert {method.chapter for method in METHODS} >= {entry.name for entry in contents.part("attention")}
    assert METHODS[0].chapter == "" and len(BY_NAME) == len(METHODS)


def test_bytes_are_those_of_the_chapters_formulas(found, lab):
    heads, linear = (contents.find(name).module() for name in ("heads", "linear"))
    layers, kv_heads, D = lab.config.layers, lab.config.kv_heads, lab.config.head_dim

    def keys(count: int, kv_heads: int = kv_heads) -> int:
        return heads.cache_bytes(layers, kv_heads, D, count)

    for name in (PLAIN, "FlashAttention", "Flash-Decoding in 4 runs"):
        assert found[name].read == found[name].held == [keys(24), keys(160)]
    assert found["PagedAttention"].held == [keys(32), keys(160)]
    assert found["MQA with one key head"].held == [keys(24, 1), keys(160, 1)]
    assert found["GQA with half the key heads"].held == [keys(24, 2), keys(160, 2)]
    assert found["sliding window of 128"].held == [keys(24), keys(128)]
    assert found["linear attention with elu"].held == [layers * kv_heads * linear.state_bytes(D, D)] * 2
    assert found["4-bit cache (FlexGen)"].held[1] * 16 == keys(160) * (4 + 32 / 32)


def test_what_reads_other_than_it_holds_says_so(found, lab):
    heads = contents.find("heads").module()
    sizes = lab.config.layers, lab.config.kv_heads, lab.config.head_dim
    args = decode_methods.chosen("patterns", BIGBIRD)[1]
    bigbird, lsh = found["BigBird in blocks of 32"], found["LSH in 4 rounds"]
    assert bigbird.held == lsh.held == found[PLAIN].held
    assert bigbird.read == [heads.cache_bytes(*sizes, 24), heads.cache_bytes(*sizes, 4 * args.block)]
    assert [2 * n for n in lsh.read] == [n * (1 + 5 * decode_methods.chosen("lsh", LSH)[1].rounds) for n in lsh.held]


@torch.no_grad()
def test_bigbird_reads_what_is_counted(lab):
    """A block of values is read if the output changes with it; the last one of a thousand tokens is not full."""
    attend = BY_NAME["BigBird in blocks of 32"].make(lab, 1, 8)[0].blocks[0].get_submodule("attention").attend
    q, k, v = torch.randn(1, 4, 1, 32), torch.randn(1, 4, 1000, 32), torch.zeros(1, 4, 1000, 32)
    read = 0
    for block in range(0, 1000, 32):
        v[:, :, block : block + 32] = 1
        read += v[:, :, block : block + 32].shape[2] if attend(q, k, v).any() else 0
        v.zero_()
    assert decode_methods.bigbird_read(lab.config, 1000) == contents.find("heads").module().cache_bytes(4, 4, 32, read)


def test_exact_methods_cost_nothing_and_rounding_little(found):
    base = found[PLAIN].perplexity
    for row in found.values():
        assert row.perplexity == pytest.approx(base, rel=1e-3) or row.trained != "exact"
    assert found["4-bit cache (FlexGen)"].perplexity == pytest.approx(base, rel=0.02)


def test_what_cannot_decode_is_not_timed(found):
    row = found["Linformer"]
    assert not row.read and not row.held and not row.ms and row.cannot and row.perplexity > found[PLAIN].perplexity
    assert all(len(row.ms) == 2 and min(row.ms) > 0 for row in found.values() if not row.cannot)


def test_what_is_written_is_read_again(kept, record):
    assert long_context.read() is None and long_context.section() is None
    long_context.write(record)
    assert long_context.read() == record


def test_chapters_that_are_gone_are_left_out(kept, record, monkeypatch):
    long_context.write(record)
    monkeypatch.setattr(contents, "CONTENTS", (contents.find("lsh"),))
    assert [row.chapter for row in long_context.read().rows] == ["", "lsh"]
    monkeypatch.setattr(contents, "CONTENTS", ())
    assert long_context.section() is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 3}', '{"rows": [{"name": "x"}]}'])
def test_a_damaged_file_is_named(kept, text):
    kept.write_text(text)
    with pytest.raises(ValueError, match=r"long_context\.json is damaged"):
        long_context.read()


def test_the_report_shows_four_panels_in_words_too(kept, record, drawn, lab, tmp_path):
    long_context.write(record)
    shown = long_context.section()
    report.write(tmp_path / "index.html", [], lab, 0.0, contexts=shown)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'id="long-context"' in page and "Linformer (cannot decode step by step: each new token" in page
    titles = [axes.get_title() for axes in drawn.axes]
    assert len(titles) == 4 and all(title in shown["image"]["alt"] for title in titles)
    assert all(method.name in shown["image"]["alt"] for method in DECODING)


def test_no_two_methods_look_alike(drawn):
    lines = [line for line in drawn.axes[0].lines if line.get_label()[0] != "_"]
    assert len({(line.get_marker(), line.get_color()) for line in lines}) == len(lines) == len(DECODING)


def test_the_command_keeps_and_prints(kept, lab, monkeypatch, capsys):
    monkeypatch.setattr(long_context.runner, "make_lab", lambda args: lab)
    monkeypatch.setattr(long_context, "METHODS", (METHODS[0], METHODS[-1]))
    monkeypatch.setattr(long_context, "LENGTHS", [16, 32])
    assert long_context.run(SimpleNamespace()) == 0
    assert [row["name"] for row in json.loads(kept.read_text())["rows"]] == [PLAIN, "Linformer"]
    assert "Linformer cannot decode step by step" in capsys.readouterr().out


def test_the_record_is_of_the_methods_that_there_are():
    record = long_context.read()
    assert record and [(row.name, row.trained) for row in record.rows] == [(m.name, m.trained) for m in METHODS]
    assert record.lengths == long_context.LENGTHS
