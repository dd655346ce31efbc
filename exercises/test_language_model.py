"""Tests of the language model: a tiny Llama with random weights, whose tokens are characters."""

import copy
import json
import math
import os
import runpy
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded

import matplotlib
import pytest
import torch
from pytest import approx
from torch.nn.functional import cross_entropy

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import language_model  # it puts the folder of passn.py on the path
import passn
from language_model import NO_TOKEN, LanguageModel, encode, load
from toy_tasks import TASKS

matplotlib.use("agg")
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # such as that an argument's name has changed
del TASKS["math-lm"]  # the tests of passn.py, in the same process, know only its own


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The entry, with settings for the tiny model: its top two of three layers, until problems are half known."""
    own = {"epochs": 30, "evaluations": 1, "batch_size": 2, "learning_rate": 1e-2, "n_layer": 2}
    monkeypatch.setitem(TASKS, "math-lm", LanguageModel)
    monkeypatch.setattr(LanguageModel, "settings", LanguageModel.settings | own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


def save_model(folder, name="Llama", end="<end>", seed=0, template=None, **changes):
    """A tiny model of an architecture, and its tokenizer: token 0 is a word, "!", and the end token is the last."""
    characters = [*map(chr, range(33, 127)), " ", "\n", "<end>"]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(characters, range(97))), unk_token="!"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    if template:
        special = [(token, characters.index(token)) for token in ("~", "<end>")]
        words.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5,
             "bos_token_id": None, "eos_token_id": 96, "pad_token_id": None}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape | changes))
    for layer in model.model.layers if hasattr(model, "model") and hasattr(model.model, "layers") else ():
        layer.self_attn.q_proj.weight.data *= 0.1  # attend to all of a text, so that a wrong mask or place shows
    model.to(model.config.dtype or torch.float32).save_pretrained(folder)
    if end is not None:
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end or None).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


def line(question, answer):
    return json.dumps({"problem": question, "solution": f"It is $\\boxed{{{answer}}}$."})


@pytest.fixture
def math_dir(tmp_path):
    train = [("What is $1+1$?", 2), ("Of $2$ and $113$, which is the larger?", 113), ("Find $x$: $x=-2$", -2)]
    test = [("What is $-3-4$, do you think?", -7), ("What is $3-1$?", 2), ("Unheard of: 2+3?", 5)]
    for name, problems in {"train.jsonl": train, "test.jsonl": test}.items():
        (tmp_path / name).write_text("\n".join(line(*problem) for problem in problems))
    return str(tmp_path)


def set_up(math_dir, model):
    task = LanguageModel(math_dir=math_dir, model=model)
    return task, task.new_model(passn.GPT, 2, 4, 64)


def prompt_and_answer(task, i):
    answer = task.answers[i]
    return [*task.texts[i][:1 - task.A]], answer[answer != NO_TOKEN].tolist()


@torch.no_grad()
def read_at_once(task, i):
    """log p of the right answer, from one pass of the original over question and answer."""
    prompt, answer = prompt_and_answer(task, i)
    logits = task.original(torch.tensor([prompt + answer])).logits[0, -1 - len(answer):-1]
    return -cross_entropy(logits, torch.tensor(answer), reduction="sum").item()


def whole(task, model):
    """The whole trained model: the original with the trained layers in place of its own."""
    result = copy.deepcopy(task.original)
    result.model.layers[1:].load_state_dict(model.model.layers.state_dict())
    return result


def test_the_problems_are_those_of_math_in_the_models_own_tokens(llama, math_dir):
    task, small = LanguageModel(math_dir=math_dir, model=llama), TASKS["math"](math_dir=math_dir)
    told = {task.tokenizer.decode(prompt): answer for prompt, answer in (prompt_and_answer(task, i) for i in range(6))}
    assert told["Unheard of: 2+3?\nAnswer:"] == task.tokenizer(" 5")["input_ids"] + [96]
    assert told["What is $-3-4$, do you think?\nAnswer:"] == task.tokenizer(" -7")["input_ids"] + [96]
    assert len(told) == 6 and task.size == 3 and task.answers.shape == (6, 5)
    assert task.baselines(passn.optimal_policy) == small.baselines(passn.optimal_policy)


@pytest.mark.parametrize("template, begin", [("$A <end>", []), ("~ $A <end>", [93]), ("~ $A", [93])])
def test_prompts_have_no_end_token(template, begin, llama, math_dir, tmp_path):
    """Some tokenizers put it after every text. p of the right answer is that of the text without it."""
    plain, (task, model) = set_up(math_dir, llama)[0], set_up(math_dir, save_model(tmp_path / "m", template=template))
    assert torch.equal(task.answers, plain.answers) and task.texts == [(*begin, *text) for text in plain.texts]
    log_p = task.log_p(model, torch.arange(6)).tolist()
    assert log_p == approx([read_at_once(task, i) for i in range(6)], rel=5e-3)


@pytest.mark.parametrize("merges, hint", [([("▁", "5")], None), ([("▁", "5"), (":", "▁5")], "no prefix")])
def test_answers_are_tokenized_behind_their_questions(merges, hint, math_dir, tmp_path, capsys):
    """As by Llama 2, whose tokenizer puts a ▁ in front of a text: " 5" alone is ▁ and ▁5."""
    model = save_model(tmp_path / "model")
    pieces = [*map(chr, range(33, 124)), "▁", "\n", *map("".join, merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)} | {"<end>": 96}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="!"))
    words.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(model)
    if hint:
        assert hint in refused(model, math_dir, capsys)
        return
    task, trained = set_up(math_dir, model)
    prompt, answer = prompt_and_answer(task, 5)
    assert answer == [vocabulary["▁5"], 96]
    assert prompt + answer[:1] == task.tokenizer("Unheard of: 2+3?\nAnswer: 5")["input_ids"]
    assert task.log_p(trained, torch.tensor([5])).item() == approx(read_at_once(task, 5), rel=5e-3)


@torch.no_grad()
def test_p_and_confidence_are_those_of_sampling_the_whole_model(llama, math_dir):
    """The question is read by the original, what follows by the trained model, in their own forward passes."""
    with torch.enable_grad():
        run, model = passn.train("math-lm", "limited", 4, math_dir=math_dir, model=llama)
    task, _ = set_up(math_dir, llama)
    log_p, tempered = task.log_ps(task.right_answers, model, torch.arange(6), [1.0, 2.0]).tolist()
    trained = whole(task, model)

    def next_logits(prompt, answers):
        cache = transformers.DynamicCache()
        task.original(torch.tensor([prompt[:-1]]), None, None, cache)
        cache.batch_repeat_interleave(len(answers))
        last = torch.full((len(answers), 1), prompt[-1])
        return trained(torch.cat([last, answers], dim=1), None, None, cache).logits[:, -1]

    torch.manual_seed(0)
    for i in range(3):
        prompt, answer = prompt_and_answer(task, i)
        sampled = torch.empty(4000, 0, dtype=torch.long)
        for _ in answer:
            sampled = torch.cat([sampled, next_logits(prompt, sampled).softmax(dim=1).multinomial(1)], dim=1)
        right = (sampled == torch.tensor(answer)).all(dim=1).double().mean().item()
        assert 0.1 < math.exp(log_p[i]) < 0.95 and right == approx(math.exp(log_p[i]), abs=0.04)
        begun = [torch.tensor([answer[:t]], dtype=torch.long) for t in range(len(answer))]
        logits = torch.cat([next_logits(prompt, tokens) for tokens in begun])
        assert tempered[i] == approx(-cross_entropy(logits / 2, torch.tensor(answer), reduction="sum").item(), abs=0.05)
    prompt, best, log_best = prompt_and_answer(task, 3)[0], torch.empty(1, 0, dtype=torch.long), 0.0
    while best.shape[1] < 5 and 96 not in best:
        top = next_logits(prompt, best).log_softmax(dim=1).max(dim=1)
        best, log_best = torch.cat([best, top.indices[:, None]], dim=1), log_best + top.values.item()
    p, confidence = task.measure(model)
    assert len(confidence) == 1 and math.log(confidence[0]) == approx(log_best, abs=0.05)  # of every fifth
    assert p.shape == (6, 3) and task.temperatures[4] == 2
    for T, values in ((0, log_p), (4, tempered)):
        assert p[T].log().tolist() == approx(values[3:], abs=1e-4)
    record = run["history"][-1]
    assert record["p"][4] == approx(p[4].tolist(), rel=1e-5)
    assert record["confidence"] == approx(confidence.item())
    assert record["train_p"] == approx(math.exp(log_p[0]))  # of every fourth


@torch.no_grad()
def test_padding_batches_and_the_way_to_logits_change_no_p(llama, math_dir, monkeypatch):
    task, model = set_up(math_dir, llama)
    together = task.log_p(model, torch.tensor([2, 0, 1]))
    alone = torch.cat([task.log_p(model, torch.tensor([i])) for i in (2, 0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.tolist() == approx([read_at_once(task, i) for i in (2, 0, 1)], rel=5e-3)
    many = task.log_p(model, torch.tensor([2, 0, 1]).repeat(20))  # more than are run at once
    torch.testing.assert_close(many, together.repeat(20), rtol=1e-5, atol=1e-5)
    logits, own = task.own_answers(model, [0, 1, 2, 3])
    one_by_one = [task.own_answers(model, [i]) for i in range(4)]
    torch.testing.assert_close(logits, torch.cat([logits for logits, _ in one_by_one]), rtol=1e-4, atol=1e-4)
    assert torch.equal(own, torch.cat([own for _, own in one_by_one]))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    right, answers = task.right_answers(model, [0, 1, 2, 4])  # and now written by the model itself:
    forced = iter(answers.T.clamp(min=0)[..., None])
    monkeypatch.setattr(language_model, "choose", lambda p: next(forced))
    own, written = task.own_answers(model, [0, 1, 2, 4])
    counts = answers != NO_TOKEN
    assert torch.equal(written, answers) and (own[counts] - right[counts]).std() < 0.02 * right.std()


def test_questions_are_read_once_and_kept_in_bfloat16(llama, math_dir):
    encode.cache_clear()
    for _ in range(2):  # as for another loss or seed
        task, model = set_up(math_dir, llama)
        task.refresh(model, 0)
        task.log_p(model, torch.arange(3))
    assert encode.cache_info().misses == 7  # the longest once more, to be compared
    states, keys_values = task.encoded(range(6), 2)
    assert {part.dtype for part in states + keys_values} == {torch.bfloat16}


def test_only_the_top_layers_are_trained(llama, math_dir):
    before = copy.deepcopy(load(llama)[0].state_dict())
    changes = {"epochs": 2, "math_dir": math_dir, "model": llama}
    (run, model), (again, _) = (passn.train("math-lm", "ce", **changes) for _ in "ab")
    for record in run["history"] + again["history"]:
        record["seconds"] = 0
    assert run == again  # the second begins with the same weights as the first
    assert all(torch.equal(value, before[name]) for name, value in load(llama)[0].state_dict().items())
    after = whole(LanguageModel(math_dir=math_dir, model=llama), model).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(("model.layers.1.", "model.layers.2."))}
    assert len(model.model.layers) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "layers" not in name)


@pytest.mark.parametrize("name, changes", [
    ("Llama", {"tie_word_embeddings": True}), ("Llama", {"dtype": torch.bfloat16}),
    ("Granite", {"logits_scaling": 8.0}), ("Gemma2", {"head_dim": 8, "sliding_window": 50}),  # no text is longer
    ("Gemma2", {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 3.0,
                "layer_types": ["sliding_attention"] * 3})])
def test_other_models_are_right_too(name, changes, math_dir, tmp_path):
    """Tied embeddings, scaled or capped logits, windows: all in the model's own forward pass."""
    task, model = set_up(math_dir, save_model(tmp_path / "model", name, **changes))
    with torch.no_grad():
        log_p = task.log_p(model, torch.arange(6)).tolist()
    assert log_p == approx([read_at_once(task, i) for i in range(6)], rel=0.02, abs=0.02)


def refused(model, math_dir, capsys, *flags):
    """The one line on standard error, after checking that it is one and that the exit status is 2."""
    options = ["--model", model, "--math-dir", math_dir, "--out", f"{math_dir}/out", "--loss", "ce", *flags]
    try:
        code = passn.main(["--task", "math-lm", *options])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("model, made, hint", [
    ("/nowhere", None, "/nowhere"), ("/nowhere.gguf", None, "/nowhere.gguf"), (__file__, None, "config"),
    ("broken.gguf", None, "broken.gguf"), ("broken", {}, "broken"), ("uninstalled", None, "transformers"),
    ("no tokenizer", {"end": None}, "tokenizer"), ("no end", {"end": ""}, "no end token"),
    ("other", {"name": "GPTNeoX"}, "GPTNeoX"), ("opt", {"name": "OPT", "word_embed_proj_dim": 32}, "OPTModel"),
    ("granite", {"name": "Granite", "embedding_multiplier": 12.0}, "other logits"),
    ("gemma2", {"name": "Gemma2", "head_dim": 8, "sliding_window": 16}, "other logits"),  # in every other layer
    ("gemma2-49", {"name": "Gemma2", "head_dim": 8, "sliding_window": 49}, "other logits")])  # one text is longer
def test_bad_models_get_one_line(model, made, hint, math_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.gguf").write_bytes(b"nonsense")
    if made is not None:
        save_model(model, **made)
    if model == "broken":
        Path(model, "model.safetensors").write_bytes(b"nonsense")
    if model == "uninstalled":
        monkeypatch.setitem(sys.modules, "transformers", None)
    said = refused(model, math_dir, capsys)
    assert hint in said.split("(needed")[0] and "like Llama" in said


@torch.no_grad()
def test_a_model_that_diverges_is_reported(llama, math_dir):
    task, model = set_up(math_dir, llama)
    model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    assert len(task.show_tries(model, 4)) == 3
    with pytest.raises(FloatingPointError, match="diverged"):
        passn.evaluate(task, model, "limited", 64)


def test_main_trains_saves_and_shows(llama, math_dir, capsys):
    for flag in ("--n-head", "--n-embd"):
        assert "does nothing" in refused(llama, math_dir, capsys, flag, "8")
    out = Path(math_dir, "out")
    flags = ["--task", "math-lm", "--model", llama, "--math-dir", math_dir, "--out", str(out), "--epochs", "1"]
    assert passn.main(flags) == 0
    said = capsys.readouterr().out
    assert (out / "math-lm.png").is_file() and len([*out.glob("math-lm-*.json")]) == 2
    assert "cross-entropy" in said and "guess best for 64 tries" in said and "Unheard of: 2+3? Answer: 5\n" in said
    run = json.loads((out / "math-lm-limited-N=64-epochs=1-seed0.json").read_text())
    assert len(run["baselines"]) == 2
    assert [len(p) for p in run["history"][-1]["p"]] == [3] * 6
    for problem, right, tries in run["tries"]:
        assert right == tries.count(problem.split("Answer:")[1]) and len(tries) == 64 and len({*tries}) > 1


def test_worker_processes_know_the_new_task(llama, math_dir, tmp_path, monkeypatch):
    """What they do: import the program under another name, and then run a job."""
    monkeypatch.delitem(TASKS, "math-lm")
    runpy.run_path(language_model.__file__, run_name="__mp_main__")
    job = {"task": "math-lm", "loss": "ce", "N": 1, "seed": 0, "math_dir": math_dir, "model": llama}
    assert passn.run_job(job | {"epochs": 1, "batch_size": 3, "out": tmp_path})
    assert len([*tmp_path.glob("math-lm-*.json")]) == 1


def test_as_a_program_it_wants_a_model_and_runs_from_any_folder(llama, math_dir, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [language_model.__file__, *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(language_model.__file__, run_name="__main__")
        return stop.value.code, capsys.readouterr()

    for arguments in ([], ["-h"], ["--math-dir", "x"]):
        code, said = run(*arguments)
        assert code == 2 and "MODEL --math-dir DIR" in said.err and said.err.count("\n") == 1
    monkeypatch.chdir(math_dir)
    code, said = run(llama, "--math-dir", ".", "--out", "x", "--loss", "ce", "--epochs", "1", "--batch-size", "3")
    assert code == 0 and "64 tries" in said.out and len([*Path("x").glob("math-lm-*.json")]) == 1
