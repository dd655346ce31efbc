"""Tests of the language model: a tiny Llama with random weights, whose tokens are characters."""

import copy
import json
import math
import os
import pickle
import re
import runpy
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded

import matplotlib
import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import language_model  # it puts the folder of passn.py on the path
import passn
from language_model import NO_TOKEN, LanguageModel, load, math_lm
from passn import answer_log_p, optimal_policy, train

matplotlib.use("agg")
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
SETTINGS = passn.SETTINGS["math-lm"]
ENTRIES = [(passn.TASKS, "math-lm", math_lm), (passn.KINDS, "language model", LanguageModel),
           (passn.SETTINGS, "math-lm", SETTINGS)]
for registry, name, _ in ENTRIES:
    del registry[name]  # the tests of passn.py, in the same process, know only its own


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The entries, with settings for the tiny model: its top two of three layers, until problems are half known."""
    for registry, name, value in ENTRIES:
        monkeypatch.setitem(registry, name, value)
    own = {"epochs": 30, "evaluations": 1, "batch_size": 2, "learning_rate": 1e-2, "n_layer": 2}
    monkeypatch.setitem(passn.SETTINGS, "math-lm", SETTINGS | own)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def save_model(folder, name="Llama", end="<end>", seed=0, **changes):
    """A tiny model of an architecture, and its tokenizer: token 0 is a word, "!", and the end token is the last."""
    characters = [*map(chr, range(33, 127)), " ", "\n", "<end>"]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(characters, range(97))), unk_token="!"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5,
             "bos_token_id": None, "eos_token_id": 96, "pad_token_id": None}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape | changes))
    for layer in model.model.layers if hasattr(model, "model") and hasattr(model.model, "layers") else ():
        layer.self_attn.q_proj.weight.data *= 0.1  # attend to all of a text, so that a wrong mask or place shows
    model.to(model.config.dtype or torch.float32).save_pretrained(folder)
    if end:
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


def problem(question, answer):
    return {"problem": question, "solution": f"It is $\\boxed{{{answer}}}$."}


MATH = {
    "train": [problem("What is $1+1$?", 2), problem("Of $2$ and $13$, which is the larger?", 13),
              problem("Find $x$: $x=-2$", -2)],
    "test": [problem("What is $-3-4$, do you think?", -7), problem("What is $3-1$?", 2),
             problem("Unheard of: 2+3?", 5)],
}


@pytest.fixture
def math_dir(tmp_path):
    for split, problems in MATH.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return tmp_path


def kind_of(task, model, **changes):
    return LanguageModel(task, passn.SETTINGS["math-lm"] | {"model": model} | changes, 0, "cpu")


def tokens_of(row):
    return row[row != NO_TOKEN].tolist()


def whole(kind, model):
    """The whole trained model: the original with the trained layers in place of its own."""
    result = copy.deepcopy(kind.original)
    for layer, trained in zip(result.model.layers[-len(model.model.layers):], model.model.layers):
        layer.load_state_dict(trained.state_dict())
    return result


def test_the_problems_are_those_of_math_in_the_models_own_tokens(llama, math_dir):
    task, small = math_lm(0, math_dir, llama), passn.TASKS["math"](0, math_dir)
    tokenizer = load(llama)[1]
    told = {tokenizer.decode(tokens_of(prompt)): tokens_of(answer) for split in (task.train, task.test)
            for prompt, answer in zip(*split)}
    assert told["Unheard of: 2+3?\nAnswer:"] == tokenizer(" 5")["input_ids"] + [96]
    assert told["What is $-3-4$, do you think?\nAnswer:"] == tokenizer(" -7")["input_ids"] + [96] and len(told) == 6
    assert task.train[1].shape[1] == task.test[1].shape[1] == 4
    for policy in (lambda p, N: p, optimal_policy):
        assert passn.guess_pass_at_n(task, policy, 8) == pytest.approx(passn.guess_pass_at_n(small, policy, 8))


@torch.no_grad()
def test_p_and_confidence_are_those_of_sampling_the_whole_model(llama, math_dir):
    """The question is read by the original, what follows by the trained model, in their own forward passes."""
    task = math_lm(0, math_dir, llama)
    with torch.enable_grad():
        run, model = train(task, "limited", 4, model=llama)
    kind = kind_of(task, llama)
    measured = kind.measure(model, "train", [1.0, 2.0])
    p, confidence = (values.tolist() for values in measured[1.0][:2])
    trained = whole(kind, model)

    def next_logits(prompt, answers):
        cache = kind.original(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(answers))
        last = torch.full((len(answers), 1), prompt[-1])
        return trained(torch.cat([last, answers], dim=1), past_key_values=cache).logits[:, -1]

    torch.manual_seed(0)
    for i, (prompt, answer) in enumerate(zip(*task.train)):
        prompt, answer = tokens_of(prompt), tokens_of(answer)
        sampled = torch.empty(4000, 0, dtype=torch.long)
        for _ in answer:
            sampled = torch.cat([sampled, next_logits(prompt, sampled).softmax(dim=1).multinomial(1)], dim=1)
        right = (sampled == torch.tensor(answer)).all(dim=1).double().mean().item()
        assert 0.1 < p[i] < 0.95 and right == pytest.approx(p[i], abs=0.04)
        logits = torch.cat([next_logits(prompt, torch.tensor([answer[:t]]).long()) for t in range(len(answer))])
        log_p = answer_log_p(logits[None], torch.tensor([answer]), 2.0).item()
        assert math.log(measured[2.0][0][i]) == pytest.approx(log_p, abs=0.05)
    prompt, best, log_best = tokens_of(task.train[0][0]), torch.empty(1, 0, dtype=torch.long), 0.0
    while best.shape[1] < 4 and 96 not in best:
        top = next_logits(prompt, best).log_softmax(dim=1).max(dim=1)
        best, log_best = torch.cat([best, top.indices[:, None]], dim=1), log_best + top.values.item()
    assert len(confidence) == 1 and math.log(confidence[0]) == pytest.approx(log_best, abs=0.05)  # of every fifth
    assert run["history"][-1]["train"]["pass@1"] == pytest.approx(sum(p) / 3)


@torch.no_grad()
def test_padding_and_batches_change_no_p(llama, math_dir):
    kind = kind_of(math_lm(0, math_dir, llama), llama)
    model = kind.new_model()
    together = kind.log_p(model, torch.tensor([2, 0, 1]))
    alone = torch.cat([kind.log_p(model, torch.tensor([i])) for i in (2, 0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    for i, log_p in zip((2, 0, 1), together):  # before training it is one pass over question and answer
        prompt, answer = (tokens_of(part[i]) for part in kind.task.train)
        logits = kind.original(torch.tensor([prompt + answer])).logits[:, len(prompt) - 1:-1]
        torch.testing.assert_close(log_p, answer_log_p(logits, torch.tensor([answer]))[0], rtol=5e-3, atol=0)
    logits, own = kind.own_answers(model, [0, 1, 2, 3])
    one_by_one = [kind.own_answers(model, [i]) for i in range(4)]
    torch.testing.assert_close(logits, torch.cat([logits for logits, _ in one_by_one]), rtol=1e-4, atol=1e-4)
    assert torch.equal(own, torch.cat([own for _, own in one_by_one]))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@torch.no_grad()
def test_right_answers_written_by_the_model_itself_have_the_same_logits(llama, math_dir, monkeypatch):
    """The two ways to logits agree: layers on stored states, and all layers, token by token."""
    kind = kind_of(math_lm(0, math_dir, llama), llama)
    model = kind.new_model()
    right, answers = kind.right_answers(model, [0, 1, 2, 4])
    forced = iter(answers.T.clamp(min=0)[..., None])
    monkeypatch.setattr(torch, "multinomial", lambda p, number, generator: next(forced))
    own, written = kind.own_answers(model, [0, 1, 2, 4])
    assert torch.equal(written, answers)
    counts = answers != NO_TOKEN
    assert (own[counts] - right[counts]).std() < 0.02 * right.std()


def test_only_the_top_layers_are_trained(llama, math_dir):
    task = math_lm(0, math_dir, llama)
    before = copy.deepcopy(load(llama)[0].state_dict())
    runs = [train(task, "ce", 4, epochs=2, model=llama) for _ in range(2)]
    (run, model), (again, _) = runs
    for record in run["history"] + again["history"]:
        record["seconds"] = 0
    assert run == again  # the second begins with the same weights as the first
    assert all(torch.equal(value, before[name]) for name, value in load(llama)[0].state_dict().items())
    after = whole(kind_of(task, llama), model).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if re.match(r"model\.layers\.[12]\.", name)}
    assert len(model.model.layers) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "layers" not in name)


@pytest.mark.parametrize("name, changes", [
    ("Llama", {"tie_word_embeddings": True}), ("Llama", {"dtype": torch.bfloat16}),
    ("Granite", {"logits_scaling": 8.0}),
    ("Gemma2", {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 3.0,
                "layer_types": ["sliding_attention"] * 3})])
def test_other_models_are_right_too(name, changes, math_dir, tmp_path):
    """Tied embeddings, scaled or capped logits, a window shorter than the text: all in the model's own forward pass."""
    model = save_model(tmp_path / "model", name, **changes)
    kind = kind_of(math_lm(0, math_dir, model), model)
    with torch.no_grad():
        log_p = kind.log_p(kind.new_model(), torch.tensor([1]))
        prompt, answer = (tokens_of(part[1]) for part in kind.task.train)
        own = kind.original(torch.tensor([prompt + answer])).logits[:, len(prompt) - 1:-1]
    torch.testing.assert_close(log_p, answer_log_p(own, torch.tensor([answer])), rtol=0.02, atol=0.02)


def refused(model, math_dir, capsys):
    """The one line on standard error, after checking that it is one and that the exit status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        passn.main(["--task", "math-lm", "--model", model, "--math-dir", str(math_dir), "--out", str(math_dir / "out")])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and "like Llama" in said.err
    return said.err


@pytest.mark.parametrize("model, hint", [
    ("/nowhere", "/nowhere"), ("/nowhere.gguf", "/nowhere.gguf"), (__file__, "config"), ("broken.gguf", "broken.gguf"),
    ("no tokenizer", "tokenizer"), ("no end", "no end token"), ("other", "GPTNeoXForCausalLM"), ("opt", "OPTModel"),
    ("granite", "other logits"), ("gemma2", "other logits"), ("broken", "broken")])
def test_bad_models_get_one_line(model, hint, llama, math_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.gguf").write_bytes(b"nonsense")
    if model == "no tokenizer":
        save_model(model, end=None)
    if model == "no end":
        save_model(model)
        file = Path(model, "tokenizer_config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))
    if model == "other":
        save_model(model, "GPTNeoX")
    if model == "opt":
        save_model(model, "OPT", word_embed_proj_dim=32)
    if model == "granite":
        save_model(model, "Granite", embedding_multiplier=12.0)
    if model == "gemma2":  # the windows of the upper layers are not those of the lower ones
        save_model(model, "Gemma2", head_dim=8, sliding_window=16)
    if model == "broken":
        save_model(model)
        Path(model, "model.safetensors").write_bytes(b"nonsense")
    assert hint in refused(model, math_dir, capsys)


def test_without_transformers_one_line_says_so(math_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if not installed
    assert "transformers" in refused("any", math_dir, capsys).split("(needed")[0]


def test_main_trains_saves_and_shows(llama, math_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--math-dir", str(math_dir), "--out", str(out), "--epochs", "1"]
    assert passn.main(["--task", "math-lm", "--model", llama, *arguments]) == 0
    said = capsys.readouterr().out
    assert (out / "math-lm.png").is_file() and len([*out.glob("math-lm-*.json")]) == 2
    assert "cross-entropy" in said and "guess optimally" in said and "Unheard of: 2+3? Answer: 5\n" in said
    run = json.loads(next(out.glob("math-lm-limited-N64-*.json")).read_text())
    assert run["config"]["model"] == llama and run["rivals"] and len(run["problems"]["p"]) == 3
    assert len(run["problems"]["confidence"]) == 1 and [len(tries) for _, _, tries in run["example"]] == [64] * 3
    assert all(right == tries.count(problem.split("Answer:")[1]) for problem, right, tries in run["example"])
    assert all(len({*tries}) > 1 for _, _, tries in run["example"])


def test_runs_of_two_models_or_data_sets_are_never_mixed(llama, math_dir, tmp_path, capsys):
    same_name = save_model(tmp_path / "elsewhere" / Path(llama).name, seed=1)
    same_weights = save_model(tmp_path / "again" / Path(llama).name, rope_theta=5e5)
    tasks = [math_lm(0, math_dir, model) for model in (llama, same_name, same_weights)]
    (math_dir / "test.jsonl").write_text(json.dumps(problem("What is $6-1$?", 5)))
    tasks.append(math_lm(0, math_dir, llama))
    assert len({task.data for task in tasks}) == 4 and all(task.data.startswith(Path(llama).name) for task in tasks)
    for task, model in zip(tasks, (llama, same_name, same_weights, llama)):
        train(task, "ce", out=tmp_path / "out", model=model, epochs=0)
    assert len([*(tmp_path / "out").glob("*.json")]) == 4
    for task in tasks:
        rows = passn.load_runs(tmp_path / "out", "math-lm", task.data, 64)
        assert [run["config"]["data"] for row in rows for run in row] == [task.data]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--math-dir", "x"]])
def test_without_a_model_one_line_tells_the_usage(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [language_model.__file__, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(language_model.__file__, run_name="__main__")
    said = capsys.readouterr()
    assert stop.value.code == 2 and "MODEL --math-dir DIR" in said.err and said.err.count("\n") == 1


def test_worker_processes_know_the_new_kind(llama, math_dir, tmp_path, monkeypatch):
    """What they do: import the program under another name, and unpickle a job."""
    job = {"task": math_lm(0, math_dir, llama), "loss": "ce", "model": llama, "epochs": 0, "out": tmp_path}
    for registry, name, _ in ENTRIES:
        monkeypatch.delitem(registry, name)
    runpy.run_path(language_model.__file__, run_name="__mp_main__")
    run = passn.run_job(pickle.loads(pickle.dumps(job)))
    assert run["task"] == "math-lm" and len(run["problems"]["p"]) == 3


def test_as_a_program_it_runs_from_any_folder(llama, math_dir, monkeypatch, capsys):
    flags = ["--math-dir", ".", "--out", "x", "--loss", "ce", "--epochs", "0"]
    monkeypatch.setattr(sys, "argv", [language_model.__file__, llama, *flags])
    monkeypatch.chdir(math_dir)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(language_model.__file__, run_name="__main__")
    assert stop.value.code == 0 and "64 tries" in capsys.readouterr().out
    assert len([*(math_dir / "x").glob("math-lm-*.json")]) == 1
