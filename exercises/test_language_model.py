"""Tests of the language model: a tiny Llama with random weights, whose tokens are characters, and " 5"."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import language_model  # it puts the folder of passn.py on the path
import passn
from language_model import NO_TOKEN, LanguageModel, encode
from toy_tasks import TASKS

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # such as that an argument's name has changed
del TASKS["math-lm"]  # the tests of passn.py, in the same process, know only its own
TRAIN = {"What is $1+1$?": 2, "Of $2$ and $113$, which is the larger?": 113, "Find $x$: $x=-2$": -2}
TEST = {"What is $-3-4$, do you think?": -7, "What is $3-1$?": 2, "Unheard of: 2+3?": 5}


@pytest.fixture(autouse=True)
def registered(monkeypatch, tmp_path):
    small = {"epochs": 4, "evaluations": 1, "batch_size": 2, "n_layer": 2}
    monkeypatch.setitem(TASKS, "math-lm", LanguageModel)
    monkeypatch.setattr(LanguageModel, "settings", LanguageModel.settings | small)
    monkeypatch.chdir(tmp_path)
    for split, problems in ("train", TRAIN), ("test", TEST):
        examples = [{"problem": text, "solution": f"\\boxed{{{problems[text]}}}"} for text in problems]
        Path(f"{split}.jsonl").write_text("\n".join(map(json.dumps, examples)))


def save_model(name="llama", end="<end>", template="$A", merges=[("▁", "5")], **changes):
    """The path of a model. Its tokenizer puts a ▁ before a text, as Llama 2's; token 0 is a word, the last an end."""
    pieces = [*map(chr, range(33, 123)), "▁", "\n", *map("".join, merges)]
    vocabulary = dict(zip(pieces, range(96))) | {"<end>": 96}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="!"))
    words.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(r"\A| "), "▁")
    words.decoder = tokenizers.decoders.Fuse()
    words.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=[("<end>", 96)])
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 96}
    config = transformers.AutoConfig.for_model(name, **shape | changes)  # 0.3: so they attend to all of a text
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = Path("model").resolve()  # in full: models are kept by their paths
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end).save_pretrained(folder)
    return str(folder)


def set_up(**changes):
    task = LanguageModel(math_dir=".", model=save_model(**changes))
    return task, task.new_model(passn.GPT, 2, 4, 64)


@torch.no_grad()
def read_at_once(task, prompt, answer, T=1):
    """p of an answer at temperature T, from one pass of the original over prompt and answer."""
    logits = task.original(torch.tensor([prompt + answer])).logits[0, -1 - len(answer):-1]
    return (logits / T).softmax(-1)[range(len(answer)), answer].prod().item()


@pytest.mark.parametrize("changes", [
    {"template": "$A <end>"}, {"dtype": torch.bfloat16},
    {"name": "gemma2", "head_dim": 8, "sliding_window": 51}])  # no text is longer
def test_p_is_that_of_question_and_answer_read_at_once(changes):
    task, model = set_up(**changes)
    expected = []
    for (question, answer), tokens in zip((TRAIN | TEST).items(), task.answers.tolist()):
        prompt, text = task.tokens([f"{question}\nAnswer:", f"{question}\nAnswer: {answer}"])
        right = text[len(prompt):] + [task.end]
        assert tokens == right + [NO_TOKEN] * (task.A - len(right)) and task.end not in text
        expected.append([read_at_once(task, prompt, right, T) for T in task.temperatures])
    expected = torch.tensor(expected)
    log_p = task.log_p(model, torch.arange(6).repeat(10))  # more than are run at once
    assert_close(log_p.exp(), expected[:, 0].repeat(10), rtol=0.1, atol=0)
    assert_close(task.measure(model)[0], expected[3:].T, rtol=0.1, atol=0)


@torch.no_grad()
def test_tries_are_those_of_the_whole_model(monkeypatch):
    task, model = set_up()
    prompt = [*task.texts[3][:1 - task.A]]
    text, = task.original.generate(torch.tensor([prompt]), max_new_tokens=task.A).tolist()
    greedy = text[len(prompt):]
    assert task.own_answers(model, [0, 1, 3])[1][2].tolist() == greedy
    confidence, = task.measure(model)[1].tolist()  # of every fifth
    assert confidence == pytest.approx(read_at_once(task, prompt, greedy), rel=0.1)
    model.model.layers[0].mlp.up_proj.weight *= 1.5  # the original no more
    right, answers = task.right_answers(model, [0, 1, 3])
    steps, chances = iter(answers.T.clamp(min=0)[..., None]), []
    monkeypatch.setattr(language_model, "choose", lambda p: chances.append(p) or next(steps))  # the right answer
    logits, tries = task.own_answers(model, [0, 1, 3], temperature=2.0)
    assert torch.equal(tries, answers)
    assert_close(torch.cat(chances, 1), (logits / 2).softmax(-1))
    assert (logits - right)[answers != NO_TOKEN].std() < 0.02 * right.std()


def test_the_top_layers_are_trained_on_questions_that_are_read_once():
    settings = {"math_dir": ".", "model": save_model()}
    encode.cache_clear()
    run, model = passn.train("math-lm", "limited", 4, **settings)
    assert "model" not in run["config"]
    task = LanguageModel(**settings)
    before, after = task.new_model(passn.GPT, 2, 4, 64).state_dict(), model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "layers" in name}
    task.encoded(range(6), 2, torch.bfloat16)  # which is kept
    assert encode.cache_info().misses == 10  # 6, the longest to be compared, and 3 below no layer, to sample


def exit_status(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [language_model.__file__, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(language_model.__file__, run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize("hint, changes", [
    ("no end token", {"end": None}), ("GPTNeoX", {"name": "gpt_neox"}),
    ("no prefix", {"merges": [("▁", "5"), (":", "▁5")]}),
    ("other logits", {"name": "gemma2", "head_dim": 8, "sliding_window": 50})])  # one text is longer
def test_bad_models_get_one_line(hint, changes, monkeypatch, capsys):
    flags = "--math-dir", ".", "--loss", "ce", "--n-layer", "2", "--batch-size", "3"
    assert exit_status(monkeypatch, save_model(**changes), *flags) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and hint in said.err.split("(needed")[0]


def test_the_program_trains_saves_and_shows(monkeypatch, capsys):
    for name in ("draw", "save_figure"):
        monkeypatch.setattr(passn, name, lambda *_: None)  # to save time
    monkeypatch.delitem(TASKS, "math-lm")
    runpy.run_path(language_model.__file__, run_name="__mp_main__")  # as worker processes do
    assert "math-lm" in TASKS
    assert exit_status(monkeypatch) == exit_status(monkeypatch, "--math-dir", ".") == 2
    assert capsys.readouterr().err.count("MODEL --math-dir DIR") == 2
    flags = save_model(), "--math-dir", ".", "--loss", "limited", "--epochs", "1", "--batch-size", "3"
    assert exit_status(monkeypatch, *flags, "--n-head", "8") == 2 and "does nothing" in capsys.readouterr().err
    assert exit_status(monkeypatch, *flags) == 0
    path, = Path("out").glob("math-lm-*.json")
    problem, _, tries = json.loads(path.read_text())["tries"][2]
    assert problem == "▁Unheard▁of:▁2+3? Answer:▁5" and len({*tries}) > 1
