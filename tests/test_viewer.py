"""The viewer's page: what it holds, that it holds it inertly and in bounds, and what the tokens are known by."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lace_lightning.cli.main import main
from lace_lightning.decoding import DecodingSpec
from lace_lightning.decoding.spelling import pieces_of
from lace_lightning.evaluation.inspection import Inspection
from lace_lightning.evaluation.policy import ModelPolicy, PolicySpec
from lace_lightning.evaluation.store import Store
from lace_lightning.exchange import LatticeAttentionConfig, SameStepConfig
from lace_lightning.exchange.backends import attention_weights, eager
from lace_lightning.lattice import LatticeMask
from lace_lightning.model_spec import ModelSpec
from lace_lightning.viewer import viewer_page
from lace_lightning.viewer.block import block_of
from tests.helpers import wake
from tests.stage_helpers import MAX_LENGTH, QWEN, UnevenDoors
from tests.viewer_helpers import HOSTILE, four, island, outcome, passage

REAL_TOKENIZER = Path(__file__).parents[2] / "shared/data/tokenizer"

# ---------------------------------------------------------------- pieces


def utf8(ids: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


@given(st.text(max_size=80))
def test_pieces_of_bytes_make_the_text_and_end_whole_characters(text):
    pieces = pieces_of(list(text.encode(errors="ignore")), utf8)
    whole = text.encode(errors="ignore").decode()
    assert "".join(pieces) == whole and len(pieces) == len(whole.encode())
    if "\ufffd" in whole:  # looks like a character that is still to come
        return
    at = 0
    for character in whole:
        size = len(character.encode())
        assert pieces[at : at + size] == ("",) * (size - 1) + (character,)
        at += size


@given(st.lists(st.sampled_from([*"é漢🙂a".encode(), 0xFF]), max_size=80))
@example([0xFF] * 40)
def test_pieces_of_bytes_that_are_no_text_make_what_they_are_spelled_as(ids):
    """As an untrained model writes them."""
    assert "".join(pieces_of(ids, utf8)) == utf8(ids)


def test_pieces_of_words_keep_the_spaces_between_tokens():
    words = [f"w{index % 7}" for index in range(100)]
    pieces = pieces_of(range(100), lambda ids: " ".join(words[index] for index in ids))
    assert pieces == ("w0", *(f" {word}" for word in words[1:]))


@pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason="no shared/data")
def test_pieces_of_a_real_tokenizer_make_its_text():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL_TOKENIZER)
    text = "So  x² + 3≠7, 你好 👩‍🚀 naïve\n\n\tend. " * 12
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(ids, tokenizer.decode)
    assert "".join(pieces) == tokenizer.decode(ids) and sum(piece == "" for piece in pieces) < len(ids) / 3


# ---------------------------------------------------------------- reads


TASK = UnevenDoors()
DECODING = DecodingSpec(max_new_tokens=10)


def policy_of(exchange, **keep) -> ModelPolicy:
    torch.manual_seed(0)
    spec = ModelSpec(architecture=QWEN, exchange=exchange, num_threads=3)
    made = PolicySpec(spec, decoding=DECODING, max_length=MAX_LENGTH, device="cpu").build(TASK, **keep)
    wake(made.model)
    return made


def inspected(policy: ModelPolicy, count: int = 3) -> list[tuple[object, list[Inspection | None]]]:
    played = policy.play([TASK.problem(index, "test") for index in range(count)], list(range(count)))
    taken = iter(policy.take_inspections([thread for group in played.groups for thread in group.threads]))
    return [(group, [next(taken) for _ in group.threads]) for group in played.groups]


def by_hand(policy: ModelPolicy, group) -> dict[tuple[int, int], dict[tuple[int, int], float]]:
    """Attention of every token (thread, time) on every other thread's (thread, time), from one group alone.

    The weights are those with which the eager backend mixes values: it gets unit vectors as values.
    """
    prompt = TASK.template.encode_prompt(group.problem.text, policy.tokenizer)
    columns = max(thread.columns[-1] for thread in group.threads) + 1
    ids = torch.zeros(1, len(group.threads), len(prompt) + columns, dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    ids[..., : len(prompt)], mask[..., : len(prompt)] = torch.tensor(prompt), True
    for n, thread in enumerate(group.threads):
        at = torch.tensor(thread.columns) + len(prompt)
        ids[0, n, at], mask[0, n, at] = torch.tensor(thread.token_ids), True
    mixed: list[torch.Tensor] = []

    def watch(q: torch.Tensor, k: torch.Tensor, lattice_mask: LatticeMask, bias: None) -> torch.Tensor:
        unit = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        mixed.append(eager(q, k, unit, lattice_mask).mean(1))
        return attention_weights(q, k, lattice_mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lace_lightning.exchange.lattice_attention.attention_weights", watch)
        policy.model.read(ids, mask, len(prompt))
    weights, n_threads = torch.stack(mixed).mean(0), len(group.threads)
    first = -len(prompt) if policy.model.exchange_config.reads_prompt else 0
    found: dict = {(n, t): {} for n in range(n_threads) for t in range(columns)}
    for block, rows in enumerate(weights.tolist()):  # scope aligned has a block per column
        for query, row in enumerate(rows):
            for key, weight in enumerate(row):
                time = first + (block if len(weights) > 1 else 0)
                reader = (query % n_threads, time + query // n_threads)
                read = (key % n_threads, time + key // n_threads)
                if read[0] != reader[0] and weight > 0 and min(reader[1], read[1]) >= 0:
                    found[reader][read] = weight
    return found


@pytest.mark.parametrize("reads_prompt", [False, True])
@pytest.mark.parametrize("scope", ["causal", "aligned"])
def test_reads_are_the_largest_weights_of_the_eager_backend_on_other_threads(scope, reads_prompt):
    """Weights on a prompt that takes part count, but are not shown."""
    exchange = LatticeAttentionConfig(reads_prompt, width=8, heads=2, scope=scope)
    policy = policy_of(exchange, keep_reads=True)
    num_reads = 0
    for group, inspections in inspected(policy):
        weights = by_hand(policy, group)
        for n, (thread, inspection) in enumerate(zip(group.threads, inspections, strict=True)):
            assert inspection.thread == n and len(inspection.pieces) == len(inspection.segments) == thread.num_tokens
            assert len(inspection.reads) == len(inspection.gates) == thread.num_tokens
            for time, reads in zip(thread.columns, inspection.reads, strict=True):
                expected = sorted(weights[n, time].items(), key=lambda item: -item[1])[:3]
                assert [share for _, _, share in reads] == pytest.approx([share for _, share in expected], abs=1e-5)
                for m, read_time, share in reads:
                    assert weights[n, time][m, read_time] == pytest.approx(share, abs=1e-5)
                num_reads += len(reads)
    assert num_reads > 60


def test_reads_are_recorded_only_on_request_and_only_where_attention_is():
    attention = LatticeAttentionConfig(scope="causal", width=8, heads=2)
    gateless = SameStepConfig(width=8, heads=2)
    for exchange, keep, has_gates in [
        (attention, {}, False), (attention, {"keep_gates": True}, True), (gateless, {"keep_reads": True}, False)
    ]:  # fmt: skip
        for _, inspections in inspected(policy_of(exchange, **keep), count=1):
            for inspection in inspections:
                assert inspection.reads is None and (inspection.gates is not None) == has_gates and inspection.pieces


# ---------------------------------------------------------------- what the page holds


def test_a_block_holds_the_tokens_plane_by_plane():
    record = four()
    texts: list[str] = []
    block = block_of(
        record.passages, lambda text: texts.index(text) if text in texts else texts.append(text) or len(texts) - 1
    )
    planes = np.frombuffer(zlib.decompress(base64.b64decode(block), -15), dtype=np.uint8)
    at = 0
    for one in record.passages:
        own = planes[at : (at := at + 9 * (3 + 2 + 1 + 1 + 3 * 4))].reshape(-1, 9).astype(int)
        assert [texts[number] for number in own[0] + 256 * own[1] + 65536 * own[2]] == list(one.inspection.pieces)
        assert (own[3] + 256 * own[4]).cumsum().tolist() == list(one.passage.thread.columns)
        assert ["-pteagA"[kind] for kind in own[5]] == list("tteaaaAgg")  # A: the answer
        assert own[6].tolist() == [round(100 * gate) for gate in one.gates]
        for rank, reads in enumerate(zip(*one.inspection.reads, strict=True)):
            threads, low, high, shares = own[7 + 4 * rank : 11 + 4 * rank]
            back = [time - read for time, (_, read, _) in zip(one.passage.thread.columns, reads, strict=True)]
            # What stands in a later column was never read: such a pair is shown at the reader's own column.
            assert (low + 256 * high).tolist() == [max(0, columns) for columns in back]
            assert threads.tolist() == [m + 1 for m, _, _ in reads] and set(shares) == {50 if rank == 0 else 25}
        assert not own[15].any()  # no third read
    assert at == len(planes)


def test_reads_of_more_threads_than_a_byte_can_name_are_left_out():
    one = passage(0, ["a", "b"], reads=[[(254, 0, 0.5), (255, 0, 0.4)], [(300, 1, 0.5)]])
    planes = np.frombuffer(zlib.decompress(base64.b64decode(block_of([one], lambda text: 0)), -15), dtype=np.uint8)
    first, second = (planes[12 + 8 * rank : 20 + 8 * rank].reshape(4, 2) for rank in range(2))
    assert first[0].tolist() == [255, 0] and second[0].tolist() == [0, 0] and not second[3].any()


def test_only_the_tokens_that_spell_the_answer_are_marked_as_it():
    """The last place in the assessment where it stands, and no token that only touches it."""
    pieces = ["13", ";", "13", " or", ":", "1", "3", ".", "[[best]]"]
    one = passage(0, pieces, "taaaaaaag", answer="13")
    planes = zlib.decompress(base64.b64decode(block_of([one], pieces.index)), -15)
    assert "".join("-pteagA"[kind] for kind in planes[45:54]) == "taaaaAAag"


def test_rows_say_how_each_outcome_ended():
    records = [four("a"), four("b", chosen=1), four("c", rights="0000"), four("d", tags="bbff")]
    rows = island(viewer_page("mine", records))["rows"]
    assert [row["found"] for row in rows] == ["chosen right", "found but not chosen", "not found", "chosen right"]
    assert [row["tags_invalid"] for row in rows] == [False, False, False, True]
    assert [thread["tag"] for thread in rows[0]["threads"]] == ["best", "fail", "success", "fail"]


def test_threads_that_were_never_one_group_have_no_invalid_tags():
    singles = [passage(0, ["x"], tag=None, group=n) for n in range(3)]
    (row,) = island(viewer_page("mine", [outcome(*singles)]))["rows"]
    assert not row["tags_invalid"]


def test_the_outcomes_of_a_problem_stand_together():
    records = [four(name, method=method) for method in ("lace", "vote") for name in ("p0", "p1")]
    rows = island(viewer_page("mine", records))["rows"]
    assert [(row["id"], row["method"]) for row in rows] == [
        ("p0", "lace"),
        ("p0", "vote"),
        ("p1", "lace"),
        ("p1", "vote"),
    ]


def test_a_thread_that_was_not_inspected_shows_its_text():
    bare = passage(0, ["all of", " it"])
    record = outcome(type(bare)(bare.passage, bare.verdict))
    data = island(viewer_page("mine", [record]))
    assert "all of it" in data["pieces"] and data["rows"][0]["threads"][0]["shown"] == 1


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("max_bytes", [60_000, 75_000, 10**6])
def test_the_page_keeps_to_its_size_and_says_what_is_missing(max_bytes):
    records = [four(f"p{index}", text=f"{index} " + "<" * 300) for index in range(60)]
    page = viewer_page("mine", records, max_bytes)
    data = island(page)
    assert len(page.encode()) <= max_bytes
    assert len(data["rows"]) == len(data["blocks"]) == 60 - data["left_out"]
    assert (data["left_out"] > 0) == (max_bytes < 10**6) and len(data["rows"]) > 5


def test_one_enormous_token_and_very_many_different_ones_keep_to_the_size():
    huge = outcome(passage(0, ["x" * 1_000_000]))
    page = viewer_page("mine", [huge])
    assert len(page) < 100_000 and "1,000,000 characters" in page
    different = outcome(passage(0, [f"{index} " + "\U0001f600" * 1000 for index in range(300)]), name="other")
    assert len(viewer_page("mine", [different], 500_000).encode()) <= 500_000


# ---------------------------------------------------------------- hostile text


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_and_reads_back_as_text(text):
    hostile = outcome(
        passage(0, [text, "b"], answer=text, role=text),
        text=text,
        name=text,
        reference=text,
        method=text,
        benchmark=text,
    )
    page = viewer_page(text, [hostile])
    assert not set(re.findall(r'id="data">(.*)</script>\n<script>', page, re.DOTALL)[0]) & set("<>&")
    harmless = viewer_page("mine", [outcome(passage(0, ["a", "b"]))])
    assert Elements(page).found == Elements(harmless).found
    page.encode()
    data = island(page)
    row = data["rows"][0]
    shown = [data["pieces"][1], data["title"]] + [
        row[key] for key in ("id", "problem", "reference", "method", "benchmark")
    ]
    assert len(set(shown)) == 1
    assert not set(shown[0]) & set("\x00\x1b\u202e\u2066\u2028\ud800")
    if text.isprintable():
        assert shown[0] == text


def test_the_policy_lets_nothing_run_but_the_pages_own_script():
    page = viewer_page("mine", [four()])
    elements = Elements(page).found
    (policy,) = [a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(script) == len(style) == 1
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style[0], script[0])]
    own = f"style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    assert policy == f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"
    assert not any(name.startswith("on") or name in ("src", "style") for _, a in elements for name in a)
    assert "http://" not in page and "https://" not in page
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page and "eval(" not in page


# ---------------------------------------------------------------- the command


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    with Store(tmp_path / "toy", {"methods": {}}, {}) as store:
        store.add([four("a"), four("b", chosen=1)])
    return tmp_path / "toy"


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: found.append(address) or True)
    return found


def test_view_makes_the_page_of_a_folder_and_opens_it(evaluated, opened, capsys):
    assert main(["view", str(evaluated)]) == 0
    assert opened == [(evaluated / "viewer.html").as_uri()]
    data = island((evaluated / "viewer.html").read_text())
    assert data["title"] == "toy" and [row["id"] for row in data["rows"]] == ["a", "b"]
    assert main(["view", str(evaluated / "outcomes.jsonl"), "--no-open", "--out", str(evaluated / "x.html")]) == 0
    assert len(opened) == 1 and (evaluated / "x.html").read_text() == (evaluated / "viewer.html").read_text()
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(evaluated / "x.html")
    assert f"lace eval report {evaluated}\n" in printed.err


def test_view_opens_the_newest_samples_of_a_run(tmp_path, opened, capsys):
    (tmp_path / "samples").mkdir()
    for age, name in enumerate(("val", "train")):
        (tmp_path / f"samples/{name}.html").write_text("x")
        os.utime(tmp_path / f"samples/{name}.html", (1000 - age, 1000 - age))
    assert main(["view", str(tmp_path)]) == 0
    (tmp_path / "config.yaml").touch()
    assert main(["view", str(tmp_path / "samples/train.html")]) == 0
    assert f"lace generate --run {tmp_path} --problem 0" in capsys.readouterr().err
    assert [Path(address).name for address in opened] == ["val.html", "train.html"]


def test_view_says_what_it_needs(tmp_path, opened, capsys):
    assert main(["view", str(tmp_path)]) == 2 and "neither outcomes.jsonl of lace eval nor" in capsys.readouterr().err
    assert main(["view", str(tmp_path), "--out=x.html"]) == 2 and "--out=x.html needs" in capsys.readouterr().err
    (tmp_path / "outcomes.jsonl").write_text("{}\n")
    assert main(["view", str(tmp_path)]) == 2 and "is not of `lace eval`" in capsys.readouterr().err
    assert opened == [] and not list(tmp_path.glob(".*"))
