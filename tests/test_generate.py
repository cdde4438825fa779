"""``lace generate``: what it prints is what the decoder decoded, and nothing a model writes acts on the terminal."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from rich.segment import Segment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lace_lightning.adapter import read_exchange_config
from lace_lightning.checkpoints import TRAINED
from lace_lightning.cli import generate, panes
from lace_lightning.cli.generate import run
from lace_lightning.cli.outcome import Outcome, why_invalid
from lace_lightning.cli.panes import FORCED_STYLE, SHADE_STYLES, PaneView, complete, growing
from lace_lightning.cli.plain import PlainView
from lace_lightning.cli.shading import Shading
from lace_lightning.cli.transcript import SHADES, Span, State, Transcript
from lace_lightning.decoding import Column, Group, GroupDecoder, Sampling, group_seed, to_groups
from lace_lightning.exchange import LatticeAttentionConfig, SameStepConfig
from lace_lightning.model_spec import ModelSpec
from lace_lightning.modules import SupervisedFinetuning
from lace_lightning.printable import printable
from lace_lightning.puzzles import Doors
from lace_lightning.tasks import Verdict
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.schema import Problem, Tag
from tests.helpers import wake
from tests.puzzle_helpers import decoded_thread, gates_of

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
EXCHANGE = LatticeAttentionConfig(width=16, heads=2, scope="aligned")
NUM_THREADS, NEW_TOKENS = 4, 14


# ---------------------------------------------------------------- a run on disk


@dataclass(frozen=True)
class Run:
    """A run of Doors with random weights, and its model."""

    folder: Path
    model: ThreadedLM

    def save(self, name: str, only: str = "") -> None:
        """Write a checkpoint of the tensors whose names hold ``only``."""
        state = {f"model.{key}": value for key, value in self.model.state_dict().items() if only in key}
        (self.folder / name).parent.mkdir(exist_ok=True)
        torch.save({"state_dict": state, TRAINED: sorted(state)}, self.folder / name)

    def configure(self, init_from: Sequence[str] = (), problems: str | None = None) -> None:
        spec = {
            "architecture": ARCHITECTURE,
            "exchange": {
                "class_path": "lace_lightning.exchange.LatticeAttentionConfig",
                "init_args": {"width": 16, "heads": 2, "scope": "aligned"},
            },
            "num_threads": NUM_THREADS,
        }
        model = {"spec": spec, "validation": {"max_new_tokens": NEW_TOKENS}, "init_from": list(init_from)}
        data = {"task": {"class_path": "lace_lightning.puzzles.Doors"}, "max_length": 64, "problems": problems}
        config = {
            "seed_everything": 0,
            "model": {"class_path": "lace_lightning.modules.SupervisedFinetuning", "init_args": model},
            "data": {"class_path": "lace_lightning.datamodules.TraceData", "init_args": data},
            "trainer": {"max_steps": 1},
        }
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def doors_run(tmp_path: Path) -> Run:
    torch.manual_seed(1)
    module = SupervisedFinetuning(ModelSpec(architecture=ARCHITECTURE, exchange=EXCHANGE))
    model = wake(module.spec.build(Doors().tokenizer())).eval()
    made = Run(tmp_path, model)
    made.configure()
    made.save("checkpoints/last.ckpt")
    return made


def decode_doors(model: ThreadedLM, index: int, sampling: Sampling, num_threads: int = NUM_THREADS) -> Group:
    """The reference: the decoder itself, told everything by hand."""
    puzzle, tokenizer = Doors(), model.tokenizer
    problem, template = puzzle.problem(index, "test"), puzzle.template
    decoder = GroupDecoder(
        model,
        sampling,
        NEW_TOKENS,
        [tokenizer.eos_token_id],
        tokenizer.pad_token_id,
        template.encode_opening(tokenizer),
    )
    seeds = [group_seed("validation", 0, problem.id)]
    prompt = template.encode_prompt(problem.text, tokenizer)
    rollout = decoder.decode([prompt], num_threads, seeds, puzzle.environment([problem], num_threads, tokenizer))
    return to_groups(rollout, [problem], seeds, tokenizer, template)[0]


def printed_threads(output: str, num_threads: int) -> list[str]:
    """The text of each thread in plain output."""
    return ["\n".join(re.findall(rf"^thread {n} \| (.*)$", output, re.MULTILINE)) for n in range(num_threads)]


def test_plain_output_is_what_the_decoder_returns(doors_run: Run, capsys: pytest.CaptureFixture[str]):
    assert run(["--run", str(doors_run.folder), "--problem", "5"]) == 0
    output = capsys.readouterr().out
    group = decode_doors(doors_run.model, 5, Sampling())
    assert printed_threads(output, NUM_THREADS) == [thread.text for thread in group.threads]
    verdicts = Doors().judge([(group.problem, thread) for thread in group.threads])
    assert output.splitlines()[-1] == Outcome(group, verdicts).sentence()
    for index, (thread, verdict) in enumerate(zip(group.threads, verdicts, strict=True)):
        state = "ended" if thread.finished == "eos" else "stopped at the token limit"
        assert re.search(
            rf"^thread {index}: {state}, {thread.num_tokens} tokens?, .*, {verdict}$", output, re.MULTILINE
        )


def test_options_of_the_command_line_override_those_of_the_run(doors_run: Run, capsys: pytest.CaptureFixture[str]):
    options = "--problem 5 --threads 6 --temperature 0.7 --top-p 0.9 --top-k 9 --min-p 0.01 --max-new-tokens 14".split()
    assert run(["--run", str(doors_run.folder), *options]) == 0
    group = decode_doors(doors_run.model, 5, Sampling(0.7, 9, 0.9, 0.01), num_threads=6)
    assert printed_threads(capsys.readouterr().out, 6) == [thread.text for thread in group.threads]


def test_a_problem_of_the_run_is_played_with_its_environment(doors_run: Run, capsys: pytest.CaptureFixture[str]):
    """Greedy threads of a model that always opens door 3: the verdict after it must be the problem's own."""
    puzzle = Doors()
    three = puzzle.tokenizer().convert_tokens_to_ids("3")
    with torch.no_grad():
        norm, head = doors_run.model.backbone.model.norm.weight, doors_run.model.backbone.lm_head.weight
        norm.zero_()  # so that no token is preferred …
        norm[0] = 1.0
        head.zero_()
        doors_run.model.backbone.model.embed_tokens.weight[:, 0] = 50.0
        head[three, 0] = 1.0  # … but this one
    doors_run.save("checkpoints/last.ckpt")
    indices = [
        next(i for i in range(99) if (puzzle.problem(i, "test").answer == "3") is is_three)
        for is_three in (True, False)
    ]
    for index, verdict in zip(indices, ("hit", "miss"), strict=True):
        assert run(["--run", str(doors_run.folder), "--problem", str(index), "--temperature", "0"]) == 0
        text = printed_threads(capsys.readouterr().out, NUM_THREADS)
        assert all(thread.startswith(f"3 3 {verdict} 3 3 {verdict} 3 3 3") for thread in text)


def test_a_prompt_that_reads_like_a_test_problem_is_that_problem(doors_run: Run, capsys: pytest.CaptureFixture[str]):
    assert run(["--run", str(doors_run.folder), "--problem", "0"]) == 0
    by_index = capsys.readouterr().out
    assert run(["--run", str(doors_run.folder), Doors().problem(0, "test").text]) == 0
    assert capsys.readouterr().out == by_index


def test_problems_of_a_file_are_counted_from_0(doors_run: Run, capsys: pytest.CaptureFixture[str]):
    rows = [
        {"id": str(door), "problem": f"doors {door} tries 1", "answer": "1", "facts": {"doors": door, "tries": 1}}
        for door in (4, 5)
    ]
    source = doors_run.folder / "problems.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    doors_run.configure(problems=str(source))
    assert run(["--run", str(doors_run.folder), "--problem", "1"]) == 0
    assert capsys.readouterr().out.startswith("problem | doors 5 tries 1\n")
    assert run(["--run", str(doors_run.folder), "--problem", "2"]) == 2
    assert re.search("--problem 2: .*problems.jsonl has 2 problems", capsys.readouterr().err)


def test_what_a_stage_did_not_train_comes_from_init_from(doors_run: Run, capsys: pytest.CaptureFixture[str]):
    argv = ["--run", str(doors_run.folder), "--problem", "1"]
    assert run(argv) == 0
    whole = capsys.readouterr().out
    doors_run.save("base.pt")
    doors_run.save("checkpoints/last.ckpt", only="exchanges")
    assert run(argv) == 0
    assert capsys.readouterr().out != whole  # the exchange alone is not the model
    doors_run.configure([str(doors_run.folder / "base.pt")])
    assert run(argv) == 0
    assert capsys.readouterr().out == whole


def test_a_checkpoint_that_holds_everything_needs_no_earlier_files(doors_run: Run):
    doors_run.configure(["gone.ckpt"])
    assert run(["--run", str(doors_run.folder), "--problem", "1"]) == 0


# ---------------------------------------------------------------- a Hugging Face model and an exchange


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE without merges: one token per byte, so characters come in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False, additional_special_tokens=[]
    )


def test_a_hugging_face_model_with_a_saved_exchange_prints_what_generate_groups_returns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = byte_tokenizer()
    model = wake(ModelSpec(architecture=ARCHITECTURE, exchange=EXCHANGE, layers=[1, 3]).build(tokenizer)).eval()
    model.backbone.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_exchange(tmp_path / "exchange")
    argv = ["--model", str(tmp_path / "model"), "--max-new-tokens", "9", "--threads", "3", "--seed", "7", "1+1?"]
    assert run([*argv, "--exchange", str(tmp_path / "exchange")]) == 0
    printed = capsys.readouterr().out
    model.num_threads = 3
    [group] = model.generate_groups(["1+1?"], max_new_tokens=9, seed=7)
    assert printed_threads(printed, 3) == [printable(thread.text) for thread in group.threads]
    assert run(argv) == 0
    assert printed_threads(capsys.readouterr().out, 3) != printed_threads(printed, 3)  # the exchange was at work


@pytest.mark.parametrize(
    "config", [EXCHANGE, LatticeAttentionConfig(scope="window", window=3), SameStepConfig(own="exclude")]
)
def test_saved_settings_build_the_exchange_that_was_saved(config, tmp_path: Path):
    model = ModelSpec(architecture=ARCHITECTURE, exchange=config, layers=[0, 2]).build(byte_tokenizer())
    model.save_exchange(tmp_path)
    assert read_exchange_config(tmp_path) == (config, [0, 2])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"exchange": "Popen", "config": {}, "layers": [1]}, "exchange 'Popen' is none of"),
        ({"exchange": "os.system", "config": {"command": "true"}, "layers": [1]}, "is none of"),
        ({"exchange": ["Isolated"], "config": {}, "layers": [1]}, "is none of"),
        ({"exchange": "SameStepConfig", "config": {"wide": 1}, "layers": [1]}, "does not fit SameStepConfig: .*'wide'"),
        ({"exchange": "SameStepConfig", "config": {"width": "8"}, "layers": [1]}, "does not fit SameStepConfig"),
        ({"exchange": "SameStepConfig", "config": {"width": 9, "heads": 2}, "layers": [1]}, "multiple of heads=2"),
        ({"exchange": "SameStepConfig", "config": {}, "layers": ["1"]}, "layers a list of whole numbers"),
        ({"exchange": "SameStepConfig", "config": []}, "config must be an object"),
        ([], "must hold an object"),
        (None, "is missing: give the folder"),
    ],
)
def test_settings_that_fit_no_exchange_are_refused(settings, complaint: str, tmp_path: Path):
    if settings is not None:
        (tmp_path / "exchange.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=complaint):
        read_exchange_config(tmp_path)


# ---------------------------------------------------------------- mistakes and interruptions


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ("x", "give one model: --model, --run, or --config with --ckpt .given: none"),
        ("x\udcff --model a", "PROMPT 'x.udcff' is not UTF-8 text"),
        ("x --model a --run b", "given: --model and --run"),
        ("x --run b --exchange c", "--exchange c goes with --model"),
        ("x --model b --ckpt c", "--ckpt c goes with --run"),
        ("x --config c", "--config c needs the checkpoint of its run: --ckpt"),
        ("--run b", "either a PROMPT or --problem"),
        ("x --run b --problem 1", "either a PROMPT or --problem"),
        ("--model b --problem 1", "--problem 1 needs a run"),
        ("x --model ./no-such-folder", "--model ./no-such-folder: no such folder"),
        ("x --model {run}", "--model .* cannot be used, give a folder or a hub name"),
        ("x --model {run} --exchange {run}", "exchange.json is missing"),
        ("x --run no-such-run", "--run no-such-run has no config.yaml"),
        ("x --config {run}/config.yaml --ckpt none.ckpt", "--ckpt none.ckpt: there is no such file"),
        ("x --config none.yaml --ckpt {run}/checkpoints/last.ckpt", "--config none.yaml: there is no such file"),
        ("x --run {run} --ckpt {run}/config.yaml", "config.yaml cannot be read"),
        ("x --config {run}/broken.yaml --ckpt {run}/checkpoints/last.ckpt", "broken.yaml is not the config of a run"),
        ("x --config {run}/other.yaml --ckpt {run}/checkpoints/last.ckpt", "other.yaml is not the config of a run"),
        ("--run {run} --problem 0 --top-p 2", "top_p=2.0 must be"),
        ("--run {run} what?", "PROMPT 'what.' has words that the model's tokenizer does not know"),
        ("--run {run} doors", "give --problem INDEX instead"),
    ],
)
def test_mistakes_end_with_code_2_and_name_option_and_remedy(
    argv: str, complaint: str, doors_run: Run, capsys: pytest.CaptureFixture[str]
):
    (doors_run.folder / "broken.yaml").write_text("model: [")
    (doors_run.folder / "other.yaml").write_text("model: {class_path: subprocess.Popen}\ndata: {}")
    assert run(argv.format(run=doors_run.folder).split()) == 2
    streams = capsys.readouterr()
    assert re.search(complaint, streams.err)
    assert not streams.out


def test_help_imports_nothing_slow():
    script = (
        "import sys\nfrom lace_lightning.cli.generate import run\n"
        "try: run(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'rich', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_ctrl_c_shows_what_there_is(
    doors_run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    add = Transcript.add

    def add_until_third(self: Transcript, column: Column) -> list[int]:
        if column.time == 3:
            raise KeyboardInterrupt
        return add(self, column)

    monkeypatch.setattr(Transcript, "add", add_until_third)
    assert run(["--run", str(doors_run.folder), "--problem", "5"]) == 130
    output = capsys.readouterr().out
    group = decode_doors(doors_run.model, 5, Sampling())
    spell = doors_run.model.tokenizer.decode
    assert printed_threads(output, NUM_THREADS) == [
        spell(thread.token_ids[:3], skip_special_tokens=True) for thread in group.threads
    ]
    assert output.endswith("interrupted: no winner\n")


# ---------------------------------------------------------------- transcripts and views, from columns made by hand


def feed(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    forced: Sequence[Sequence[int]] | None = None,
    closed: bool = True,
) -> Transcript:
    """The transcript of threads that write these texts from column 0 on; ``forced`` are columns per thread."""
    transcript = Transcript(len(texts), tokenizer, [tokenizer.eos_token_id])
    ids = [[*tokenizer.encode(text, add_special_tokens=False), *[tokenizer.eos_token_id] * closed] for text in texts]
    for time in range(max(map(len, ids))):
        written = torch.tensor([[time < len(row) for row in ids]])
        tokens = torch.tensor([[row[time] if time < len(row) else 0 for row in ids]])
        by_environment = torch.tensor([[time in columns for columns in forced or [()] * len(texts)]])
        transcript.add(Column(time, tokens, written, by_environment, torch.zeros(1, len(texts))))
    return transcript


def outcome_of(tags: Sequence[Tag | None], verdicts: Sequence[Verdict] | None = None) -> Outcome:
    threads = tuple(replace(decoded_thread(str(n)), tag=tag) for n, tag in enumerate(tags))
    return Outcome(Group(Problem("p", "", ""), threads, seed=0), verdicts)


def screen(width: int, height: int = 24, colours: bool = False) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, highlight=False, legacy_windows=False,
        color_system="truecolor" if colours else None,
    )  # fmt: skip


def drawn(console: Console, renderable: object) -> list[str]:
    """Lines of text that reach the screen."""
    console.print(renderable)
    return console.file.getvalue().splitlines()


def cells(lines: Sequence[str], thread: int) -> str:
    """The text inside the frame of a thread, spaces squeezed."""
    top = next(i for i, line in enumerate(lines) if re.search(rf"\bthread {thread}\b.*[╮┓]", line))
    at = lines[top].index(f"thread {thread}")
    left = max(lines[top].rfind(corner, 0, at) for corner in "╭┏")
    right = min(i for i in (lines[top].find(corner, at) for corner in "╮┓") if i >= 0)
    inside = []
    for line in lines[top + 1 :]:
        if line[left] in "╰┗":
            return " ".join(" ".join(inside).split())
        inside.append(line[left + 1 : right])
    raise AssertionError("a frame that never ends")


WORDS = [" ".join(f"{name}{i}" for i in range(60)) for name in ("ant", "bee", "cat", "dog")]


@pytest.mark.parametrize(("width", "tops"), [(30, [1, 1, 1, 1]), (80, [2, 2]), (200, [4])])
def test_panes_stand_side_by_side_as_the_terminal_allows_and_hold_every_word(width: int, tops: list[int]):
    transcript = feed(WORDS, byte_tokenizer())
    lines = drawn(screen(width), complete(transcript, "the problem", outcome_of([Tag.FAIL] * 4), screen(width)))
    assert [line.count("╭") for line in lines if "╭" in line] == tops
    assert max(map(len, lines)) == width
    assert lines[0] == "the problem"
    assert [cells(lines, n) for n in range(4)] == WORDS


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 10), (200, 60)])
def test_growing_panes_fill_the_terminal_with_the_last_words(width: int, height: int):
    console = screen(width, height)
    lines = drawn(console, growing(feed(WORDS, byte_tokenizer(), closed=False), "the problem", console))
    assert height - 3 <= len(lines) <= height
    for n, words in enumerate(WORDS):
        assert words.endswith(cells(lines, n))
        assert len(cells(lines, n)) > min(len(words) - 1, 100)


def test_lines_on_the_screen_do_not_flow_anew_with_every_token():
    """A long paragraph scrolls: lines stay or move up by one, but for the rare step of where its shown part begins."""
    text = " ".join(f"word{n % 7}" * (n % 3 + 1) for n in range(1000))
    frames = []
    for length in range(3000, 3600):
        lines = panes._last_lines([Span(text[:length], False)], 36, 9, screen(40))
        assert text[:length].endswith(lines[-1].plain)
        frames.append([line.plain.rstrip() for line in lines])
    steps = zip(frames, frames[1:], strict=False)
    flows = [new[:-2] not in (old[:-2], old[1:-1]) for old, new in steps]
    assert sum(flows) <= 2


def test_only_the_winner_is_framed_and_named():
    transcript = feed(["a", "b", "c"], byte_tokenizer())
    outcome = outcome_of([Tag.FAIL, Tag.BEST, Tag.SUCCESS], [Verdict.WRONG, Verdict.CORRECT, Verdict.CORRECT])
    lines = drawn(screen(120), complete(transcript, "", outcome, screen(120)))
    frame = next(line for line in lines if "┏" in line)
    assert frame.count("┏") == 1 and frame.count("╭") == 2
    assert frame.index("┏") < frame.index("★ thread 1 wins") < frame.index("┓")
    assert lines[-1] == "winner: thread 1 ([[best]], answer 1, correct)"


def test_without_valid_tags_nothing_is_framed_and_the_reason_is_given():
    transcript = feed(["a", "b", "c"], byte_tokenizer())
    lines = drawn(screen(200), complete(transcript, "", outcome_of([Tag.BEST, None, Tag.BEST]), screen(200)))
    assert not any("┏" in line or "★" in line for line in lines)
    assert lines[-1] == (
        "no winner, the tags are not valid: thread 1 does not end with exactly one tag; threads 0, 2 all say [[best]]"
    )


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ([Tag.BEST, Tag.FAIL], ""),
        ([Tag.FAIL, Tag.SUCCESS], "no thread says [[best]]"),
        ([Tag.BEST, Tag.BEST], "threads 0, 1 all say [[best]]"),
        ([None, Tag.BEST], "thread 0 does not end with exactly one tag"),
        ([None, None], "threads 0, 1 do not end with exactly one tag; no thread says [[best]]"),
    ],
)
def test_a_reason_is_given_exactly_if_tags_are_invalid(tags: list[Tag | None], reason: str):
    assert why_invalid(tags) == reason
    assert (outcome_of(tags).group.best_index is None) is bool(reason)


def test_words_of_the_environment_stand_in_their_own_style_and_tags_in_colour():
    tokenizer, console = Doors().tokenizer(), screen(80, colours=True)
    transcript = feed(["3 5 miss ; 5 [[fail]]"], tokenizer, forced=[[2]])
    assert [(span.text, span.is_forced) for span in transcript.spans(0)] == [
        ("3 5", False), (" miss", True), (" ; 5 [[fail]]", False)
    ]  # fmt: skip
    styles = {
        segment.text.strip(): str(segment.style)
        for segment in console.render(growing(transcript, "", console))
        if isinstance(segment, Segment)
    }
    assert styles["miss"] == FORCED_STYLE
    assert styles["[[fail]]"] == "bold red"
    assert FORCED_STYLE not in (styles["3 5"], styles["; 5"])


def test_panes_say_who_writes_waits_and_has_ended():
    tokenizer = byte_tokenizer()
    transcript = Transcript(3, tokenizer, [tokenizer.eos_token_id])
    for time, written in enumerate([[True, True, True], [True, False, False]]):
        tokens = torch.tensor([[5, 5, tokenizer.eos_token_id]])
        transcript.add(
            Column(time, tokens, torch.tensor([written]), torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 3))
        )
    assert [transcript.state(n) for n in range(3)] == [State.WRITING, State.WAITING, State.ENDED]
    lines = drawn(screen(120), growing(transcript, "", screen(120)))
    assert lines[0].startswith("t = 1 ")
    assert re.search("writing, 2 tokens.*waiting, 1 token .*ended, 1 token ", lines[-1])


HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold]x[/bold] [/] [link=file:///]y \x9b31m \x08\x7f \u202edrow a\r\u2028:smile:"


def test_hostile_text_reaches_the_terminal_as_text():
    tokenizer = byte_tokenizer()
    transcript, console = feed([HOSTILE, "fine"], tokenizer), screen(160)
    outcome = outcome_of([Tag.BEST, Tag.FAIL])
    hostile = replace(outcome.group.threads[0], answer=HOSTILE)
    outcome = Outcome(replace(outcome.group, threads=(hostile, outcome.group.threads[1])))
    console.print(growing(transcript, HOSTILE, console))
    lines = drawn(console, complete(transcript, HOSTILE, outcome, console))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", console.file.getvalue())
    assert "␛[2J␛]0;owned␇[bold]x[/bold] [/] [link=file:///]y" in cells(lines, 0)
    assert cells(lines, 1) == "fine"


def test_hostile_text_is_inert_in_plain_lines(capsys: pytest.CaptureFixture[str]):
    transcript = feed([HOSTILE + "\nthread 1 | forged\nwinner: thread 0"], byte_tokenizer())
    with PlainView(transcript, HOSTILE) as view:
        view.update([0])
        view.finish(None)
    output = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", output)
    assert [line.partition(" | ")[0] for line in output.splitlines()[:4]] == ["problem", *["thread 0"] * 3]


def test_printable_keeps_ordinary_text_of_any_script():
    text = "a\tb\n∑ é 日本 עברית 👩‍🔬 \\frac{1}{2}"
    assert printable(text) == text
    assert printable("\ud800").encode() == "\ufffd".encode()


def test_half_a_character_is_held_back_until_it_is_whole():
    tokenizer, text = byte_tokenizer(), "é😀 日"
    whole = feed([text], tokenizer)
    assert whole.text(0) == text
    transcript = Transcript(1, tokenizer, [tokenizer.eos_token_id])
    seen = []
    for time, token in enumerate(tokenizer.encode(text)):
        one = torch.ones(1, 1, dtype=torch.bool)
        transcript.add(Column(time, torch.tensor([[token]]), one, ~one, torch.zeros(1, 1)))
        seen.append(transcript.text(0))
        assert "".join(span.text for span in transcript.spans(0)) == seen[-1]
    assert seen == ["", "é", "é", "é", "é", *["é😀"], *["é😀 "] * 3, text]


def test_broken_bytes_are_shown_once_the_thread_is_over():
    tokenizer = byte_tokenizer()
    [first, *_] = tokenizer.encode("é")
    transcript = Transcript(1, tokenizer, [tokenizer.eos_token_id])
    one = torch.ones(1, 1, dtype=torch.bool)
    transcript.add(Column(0, torch.tensor([[first]]), one, ~one, torch.zeros(1, 1)))
    assert transcript.text(0) == ""
    transcript.close(State.LIMIT)
    assert transcript.text(0) == "\ufffd" == tokenizer.decode([first])


def test_leaving_the_panes_by_an_error_gives_the_cursor_back():
    console = screen(80, colours=True)
    with pytest.raises(KeyboardInterrupt), PaneView(feed(["a"], byte_tokenizer()), "", console) as view:
        view.update([])
        raise KeyboardInterrupt
    output = console.file.getvalue()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


def test_frames_are_drawn_no_faster_than_the_eye_or_a_tenth_of_the_time(monkeypatch: pytest.MonkeyPatch):
    clock, frames = [0.0], []

    def slow_frame(*_: object) -> str:
        frames.append(clock[0])
        clock[0] += 0.05
        return ""

    monkeypatch.setattr(panes, "growing", slow_frame)
    monkeypatch.setattr(panes.time, "monotonic", lambda: clock[0])
    with PaneView(feed(["a"], byte_tokenizer()), "", screen(80)) as view:
        for _ in range(100):
            clock[0] += 0.02
            view.update([])
    gaps = [later - earlier for earlier, later in zip(frames, frames[1:], strict=False)]
    assert len(gaps) >= 3 and min(gaps) >= 0.5


def shades_on(console: Console, renderable: object) -> list[int]:
    """The shade of each number on the screen that a thread of doors wrote, line by line."""
    styles = [str(segment.style) for segment in console.render(renderable) if re.fullmatch(r" *\d *", segment.text)]
    return [next((n for n, name in enumerate(SHADE_STYLES) if name and style.endswith(name)), 0) for style in styles]


def test_panes_are_shaded_by_gates_while_threads_are_decoded(doors_run: Run, monkeypatch: pytest.MonkeyPatch):
    """Every frame shows the gates of one full forward pass over what stood there; the group is the unwatched one."""
    console, frames = screen(60, colours=True), []

    class Watched(PaneView):
        def update(self, ended: Sequence[int]) -> None:
            frames.append([self._transcript.spans(n) for n in range(NUM_THREADS)])

        def finish(self, outcome: Outcome | None) -> None:
            frames.append(outcome)

    monkeypatch.setattr(generate, "_view", lambda transcript, problem, plain: Watched(transcript, problem, console))
    monkeypatch.setattr("lace_lightning.cli.shading.MAX_READING_SHARE", float("inf"))  # read at every column
    with torch.no_grad():
        for exchange in doors_run.model.exchange_at.values():
            exchange.gate.weight.copy_(20 * exchange.gate.weight[:1])  # all channels open and close together
    doors_run.save("checkpoints/last.ckpt")
    assert run(["--run", str(doors_run.folder), "--problem", "5"]) == 0
    *frames, outcome = frames
    group = decode_doors(doors_run.model, 5, Sampling())
    assert outcome.group == group
    gates = gates_of(doors_run.model, Doors(), group)
    spell = doors_run.model.tokenizer.decode
    assert len({round(value, 2) for values in gates for value in values}) >= 5, "gates that are all alike show nothing"
    for time, spans in enumerate(frames[:-1]):  # the last frame says again what ended
        so_far = [sum(column <= time for column in thread.columns) for thread in group.threads]
        known = [value for values, count in zip(gates, so_far, strict=True) for value in values[:count]]
        least, width = min(known), (max(known) - min(known)) / SHADES
        for thread, values, shown, count in zip(group.threads, gates, spans, so_far, strict=True):
            pieces = [spell([token], skip_special_tokens=True) for token in thread.token_ids[:count]]
            places = [(value - least) / width for piece, value in zip(pieces, values, strict=False) for _ in piece]
            shades = [span.shade for span in shown for _ in span.text.replace(" ", "")]
            assert len(shades) == len(places)
            for shade, place in zip(shades, places, strict=True):  # rounding may cross a border
                assert shade - 1e-3 <= place <= shade + 1 + 1e-3


def test_the_screen_shows_five_shades_of_gates_in_growing_and_final_panes():
    tokenizer, console = Doors().tokenizer(), screen(80, colours=True)
    transcript = feed(["1 2 3 4 5", "6 7"], tokenizer)
    transcript.shade([[0.2, 0.3, 0.4, 0.5, 0.6], [0.37]])  # the second thread's gates are known up to its first token
    expected = [0, 1, 2, 3, 4, 2, 0]  # of five steps from 0.2 to 0.6
    assert [span.shade for n in range(2) for span in transcript.spans(n)] == expected
    for panes_now in (growing(transcript, "", console), complete(transcript, "", None, console)):
        assert shades_on(console, panes_now) == expected
        assert any("gate 0.20       0.60" in line for line in drawn(screen(80), panes_now))


def test_gates_are_read_in_a_tenth_of_the_time_and_all_of_them_in_the_end(monkeypatch: pytest.MonkeyPatch):
    clock, read = [0.0], []

    class SlowReader:
        def read(self, tokens: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
            read.append((clock[0], tokens.shape[-1]))
            clock[0] += 0.05
            return torch.full(tokens.shape, 0.9)

    monkeypatch.setattr("lace_lightning.cli.shading.time.monotonic", lambda: clock[0])
    tokenizer = byte_tokenizer()
    transcript = Transcript(1, tokenizer, [tokenizer.eos_token_id])
    shading = Shading(transcript, SlowReader())
    for time in range(99):
        clock[0] += 0.02
        one = torch.tensor([[5]])
        column = Column(time, one, one > 0, one < 0, one.float())
        transcript.add(column)
        shading.add(column)
    assert min(later - earlier for (earlier, _), (later, _) in zip(read, read[1:], strict=False)) >= 0.5
    shading.finish()
    assert sum(count for _, count in read) == 99 and len(read) >= 4
    assert [span.shade for span in transcript.spans(0)] == [SHADES - 1]


def test_final_panes_are_shaded_by_the_gates_of_their_tokens():
    tokenizer = Doors().tokenizer()
    ids = tokenizer.encode("doors 8 tries 2", add_special_tokens=False)
    transcript = Transcript(1, tokenizer, [tokenizer.eos_token_id])
    for time, token in enumerate(ids):
        one = torch.tensor([[token]])
        transcript.add(Column(time, one, one >= 0, one < 0, one.float()))
    whole = transcript.text(0)
    transcript.shade([[0.0, 0.5, 0.55, 1.0][: len(ids)]])
    spans = transcript.spans(0)
    assert "".join(span.text for span in spans) == whole
    assert [span.shade for span in spans] == [0, 2, 4]
