"""The recipes against the same steps by hand, against exact gradients, and with what they refuse. What needs a package
that is not installed is skipped, and says so. As a program, this trains by both recipes and saves the parameters."""

import copy
import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from itertools import product
from math import comb
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded

import numpy as np
import pytest
import torch
from pytest import approx
from torch.testing import assert_close

import own_training as own  # it puts the folder of passn.py on the path
from passn import dco_loss, overconfidence_factor, pass_at_n

torch.set_num_threads(1)
HERE = Path(own.__file__).resolve().parent
README = (HERE.parent / "README.md").read_text(encoding="utf-8")
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
         "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
parametrize = pytest.mark.parametrize


def tiny_llama(vocab_size=20):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, pad_token_id=0, bos_token_id=0, eos_token_id=1))


def characters(vocab_size=20):
    """A tokenizer of single characters: token 2 is B."""
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2Tokenizer({chr(64 + i): i for i in range(vocab_size)}, [], unk_token="@", pad_token="@",
                                      eos_token="A", bos_token="A")


def texts(number=7):
    """Tokens and how many of the last are the answer: of all lengths."""
    torch.manual_seed(1)
    return [(torch.randint(2, 20, (5 + i % 4,)), 1 + i % 3) for i in range(number)]


def labels_of(text, length):
    return torch.cat([torch.full_like(text[:-length], -100), text[-length:]])


def log_p_by_hand(model, text, length):
    log_probs = model(text[None]).logits[0, -len(text):].float().log_softmax(dim=1)
    return sum(log_probs[t - 1, text[t]] for t in range(len(text) - length, len(text)))


def losses_by_hand(model, rows, N, pass_over):
    log_p = torch.stack([log_p_by_hand(model, *row) for row in rows])
    return dco_loss(log_p, N) * (overconfidence_factor(log_p, N) >= pass_over)


def steps_by_hand(model, rows, N, pass_over, epochs=2, window=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for start in [*range(0, len(rows), window)] * epochs:
        optimizer.zero_grad()
        losses_by_hand(model, rows[start:start + window], N, pass_over).mean().backward()
        optimizer.step()


def collate(side):
    def padded(rows):
        T = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            parts = {**{name: torch.as_tensor(row[name]) for name in ("input_ids", "labels")},
                     "attention_mask": torch.ones(len(row["input_ids"]), dtype=torch.long)}
            room = T - len(row["input_ids"])
            for name, part in parts.items():
                where = (room, 0) if side == "left" else (0, room)
                batch[name].append(torch.nn.functional.pad(part, where, value=-100 if name == "labels" else 0))
        return {name: torch.stack(parts) for name, parts in batch.items()}
    return padded


def limited(package, folder, model, rows, N=4, pass_over=0.1, side="right", **settings):
    """A trainer with the limited loss, of transformers or of TRL."""
    datasets, package = pytest.importorskip("datasets"), pytest.importorskip(package)
    pytest.importorskip("accelerate")
    data = datasets.Dataset.from_list([{"input_ids": text.tolist(), "labels": labels_of(text, length).tolist()}
                                       for text, length in rows])
    names = ("Trainer", "TrainingArguments") if package.__name__ == "transformers" else ("SFTTrainer", "SFTConfig")
    trainer, config = (getattr(package, name) for name in names)
    more = {"data_collator": collate(side)} if trainer.__name__ == "Trainer" else {"processing_class": characters()}
    args = config(str(folder), **QUIET | {"num_train_epochs": 2, "train_sampling_strategy": "sequential"} | settings)
    recipe = type("LimitedTrainer", (own.LimitedLoss, trainer), {"N": N, "pass_over": pass_over})
    return recipe(model, args, train_dataset=data, eval_dataset=data, **more)


def same(model, by_hand, **tolerance):
    for (name, trained), expected in zip(model.named_parameters(), by_hand.parameters()):
        assert_close(trained, expected, **{"rtol": 1e-4, "atol": 1e-5} | tolerance, msg=lambda text: f"{name}: {text}")


# ---- supervised ------------------------------------------------------------------------------------------


@parametrize("package, side, batch, accumulated", [
    ("transformers", "left", 1, 4), ("transformers", "right", 2, 2), ("transformers", "left", 4, 1),
    ("trl", "right", 1, 4), ("trl", "right", 2, 2), ("trl", "right", 4, 1)])
def test_the_limited_trainer_takes_the_steps_of_a_loop_by_hand(package, side, batch, accumulated, tmp_path):
    """Seven rows: the last window has three, and with 2 × 2 its batches have two and one. Some are passed over."""
    model, rows = tiny_llama(), texts()
    by_hand = copy.deepcopy(model)
    trainer = limited(package, tmp_path, model, rows, side=side, per_device_train_batch_size=batch,
                      gradient_accumulation_steps=accumulated, logging_steps=1, per_device_eval_batch_size=3)
    factors = overconfidence_factor(torch.stack([log_p_by_hand(model, *row) for row in rows]), 4)
    trainer.train()
    assert trainer.state.log_history[0]["F"] == approx(factors[:4].mean().item(), rel=1e-4) and trainer.factors == []
    steps_by_hand(by_hand, rows, 4, 0.1)
    same(model, by_hand)
    expected = losses_by_hand(by_hand, rows, 4, 0.1).mean().item()
    assert trainer.evaluate()["eval_loss"] == approx(expected, rel=1e-4)
    assert len(trainer.predict(trainer.eval_dataset).predictions) == 7


def test_solved_answers_are_passed_over_without_nan(tmp_path):
    model, rows = tiny_llama(), texts()
    factors = overconfidence_factor(torch.stack([log_p_by_hand(model, *row) for row in rows]), 4)
    some = factors.median().item()  # a little more than half are kept
    for pass_over in (some, 1.1):
        trained, by_hand = copy.deepcopy(model), copy.deepcopy(model)
        trainer = limited("transformers", tmp_path, trained, rows, pass_over=pass_over, per_device_train_batch_size=4)
        trainer.train()
        steps_by_hand(by_hand, rows, 4, pass_over)
        same(trained, by_hand)
    same(trained, model, rtol=0, atol=0)
    assert trainer.evaluate()["eval_loss"] == 0


@parametrize("package", ["transformers", "trl"])
def test_bf16_changes_the_loss_by_rounding_only(package, tmp_path):
    model, rows = tiny_llama(), texts()
    expected = losses_by_hand(model, rows, 4, 0).mean().item()
    trainer = limited(package, tmp_path, model, rows, pass_over=0, bf16=True, learning_rate=1e-9)
    assert trainer.evaluate()["eval_loss"] == approx(expected, rel=0.02)
    assert trainer.train().training_loss == approx(expected, rel=0.02)


@parametrize("package", ["transformers", "trl"])
@parametrize("kind", ["LoraConfig", "PromptTuningConfig"])
def test_lora_and_prompt_tuning_take_the_steps_by_hand(package, kind, tmp_path):
    """Prompt tuning puts virtual tokens in front, so that there are more logits than labels."""
    peft, rows = pytest.importorskip("peft"), texts()
    special = {"LoraConfig": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
               "PromptTuningConfig": {"num_virtual_tokens": 3}}
    model = peft.get_peft_model(tiny_llama(), getattr(peft, kind)(task_type="CAUSAL_LM", **special[kind]))
    by_hand, start = copy.deepcopy(model), copy.deepcopy(model)
    trainer = limited(package, tmp_path, model, rows, per_device_train_batch_size=4)
    trainer.train()
    steps_by_hand(by_hand, rows, 4, 0.1)
    same(model, by_hand)
    assert any(not torch.equal(trained, before) for trained, before in zip(model.parameters(), start.parameters()))
    assert trainer.evaluate()["eval_loss"] == approx(losses_by_hand(by_hand, rows, 4, 0.1).mean().item(), rel=1e-4)


CHAT = ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}A{% endgeneration %}"
        "{% else %}{{ 'B' + m.content + 'C' }}{% endif %}{% endfor %}")
TURNS = [{"role": "user", "content": "DEF"}], [{"role": "assistant", "content": "GH"}]


@parametrize("row, text, settings, bad, hint", [
    ({"prompt": "DEF", "completion": "GH"}, "DEFGHA", {},
     {"prompt": "DEF", "completion": "GHIJKLM"}, "fills max_length"),
    ({"prompt": TURNS[0], "completion": TURNS[1]}, "BDEFCGHA", {},
     {"prompt": TURNS[0], "completion": [{"role": "assistant", "content": "GHIJ"}]}, "fills max_length"),
    ({"messages": TURNS[0] + TURNS[1]}, "BDEFCGHA", {"assistant_only_loss": True},
     {"messages": (TURNS[0] + TURNS[1]) * 2}, "several answers"),
    ({"text": "DEFGH"}, None, {}, {"text": "DEFGH"}, "not labelled -100")])
def test_trls_data_sets_of_one_turn_and_what_is_wrong_with_others(row, text, settings, bad, hint, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer = tiny_llama(), characters()
    tokenizer.chat_template = CHAT
    recipe = type("LimitedTrainer", (own.LimitedLoss, trl.SFTTrainer), {})
    args = trl.SFTConfig(str(tmp_path), **QUIET | settings, max_length=20 if "messages" in row else 9)
    trainer = recipe(model, args, train_dataset=datasets.Dataset.from_list([bad]), processing_class=tokenizer)
    if text:
        tokens = torch.tensor([ord(character) - 64 for character in text])
        expected = dco_loss(log_p_by_hand(model, tokens, 3)[None], 64).item()
        assert trainer.evaluate(datasets.Dataset.from_list([row]))["eval_loss"] == approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match=hint):
        trainer.train()


@parametrize("labels, mask, hint", [
    ([-100, -100, -100, -100], None, "no answer"), ([2, 3, 4, 5], None, "not labelled -100"),
    ([-100, -100, 4, 5], [0, 0, 1, 1], "not labelled -100"),  # a collator wrote over labels, with padding in front
    ([-100, 3, 4, 5], [1, 1, 1, 0], "not labelled -100"),
    ([-100, 3, -100, 5], None, "several answers, or one with a hole")])
def test_a_row_that_is_no_prompt_and_one_answer_is_told_why(labels, mask, hint):
    good, ones = [-100, -100, 4, 5], [1, 1, 1, 1]
    with pytest.raises(ValueError, match=hint):
        own.answer_log_p(torch.zeros(2, 4, 6), torch.tensor([good, labels]), torch.tensor([ones, mask or ones]))


def test_a_cut_row_and_label_smoothing_are_refused_but_not_virtual_tokens(tmp_path):
    labels = torch.tensor([[-100, -100, 4, 5]])
    with pytest.raises(ValueError, match="max_length.*prefix"):
        own.answer_log_p(torch.zeros(1, 4, 6), labels, max_length=4)
    logits = torch.randn(1, 7, 6)  # of three virtual tokens in front, too
    log_probs = logits[0, 3:].log_softmax(dim=1)
    assert_close(own.answer_log_p(logits, labels, max_length=5), (log_probs[1, 4] + log_probs[2, 5])[None])
    with pytest.raises(ValueError, match="label_smoothing"):
        limited("transformers", tmp_path, tiny_llama(), texts(), label_smoothing_factor=0.1)


# ---- reinforcement ---------------------------------------------------------------------------------------


def test_advantages_are_those_by_hand():
    for dtype in (torch.bool, torch.int64, torch.float32):
        rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=dtype)
        assert_close(own.advantages(rewards, 2), rewards.float() * torch.tensor([[1 / 3], [0], [1 / 6]]))


@parametrize("rewards", [[1, 1, 1, -1], [1, 1, -1, -1], [0.5, 0.5, 0, 0], [2, 0, 0, 0], [1, float("nan"), 0, 0]])
def test_rewards_other_than_0_and_1_are_told_why(rewards):
    with pytest.raises(ValueError, match="rewards are 0 or 1"):
        own.advantages(torch.tensor([rewards, [0, 0, 0, 1]]), 2)


def test_too_few_tries_are_told_why():
    with pytest.raises(ValueError, match="8 tries: N is at most the number of tries; well below it is better"):
        own.advantages(torch.tensor([[1] + [0] * 7]), 64)


def chance(n, c, k):
    """Of k of n tries, c of them right, at least one is right."""
    return 1 - comb(n - c, k) / comb(n, k)


@parametrize("n, N", [(4, 2), (8, 3), (8, 8)])
def test_what_others_formulas_make_of_the_weights(n, N):
    """PKPO's weights minus its leave-one-out pass@(N - 1); verl's r_max - r_second, where N = n; TRL's group mean."""
    def weights(c):
        return own.advantages(torch.tensor([[1.0] * c + [0.0] * (n - c)]), N)[0].tolist()

    for c in range(1, n):
        w = weights(c)
        right, wrong = N / n, N / n * chance(n - 1, c, N - 1)
        baseline = [N / n * chance(n - 1, c - is_right, N - 1) for is_right in (1, 0)]
        assert [w[0], w[-1]] == approx([right - baseline[0], wrong - baseline[1]], abs=1e-7)
        if N == n:
            assert n * w[0] == approx(n * (c == 1))
    for p in (0.1, 0.5):
        plain = centred = 0  # times dp: the expectation of Σ advantage · d log π
        for c in range(n + 1):
            of_all = comb(n, c) * p**c * (1 - p)**(n - c) * weights(c)[0]
            plain += of_all * c / p
            centred += of_all * (c * (1 - c / n) / p + (n - c) * c / n / (1 - p))
        assert plain == approx(N * (1 - p)**(N - 1), rel=1e-6)
        assert centred / plain == approx(1 - 1 / n + (N - 1) * p / ((1 - p) * n), rel=1e-6)


def test_each_reward_function_has_its_own_weights_and_evaluation_has_plain_rewards():
    given = torch.tensor([[1.0, 0, 0, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]).T  # (tries, functions)
    base = type("Base", (), {"_calculate_rewards": lambda self: given, "__init__": lambda self: None})
    trainer = object.__new__(type("PassAtNTrainer", (own.PassAtN, base), {"N": 2}))
    trainer.model, trainer.num_generations, trainer._metrics = torch.nn.Linear(1, 1), 4, {"train": defaultdict(list)}
    rewards = trainer._calculate_rewards()
    for column, weighted_column in zip(given.T, rewards.T):
        assert_close(weighted_column, 4 * own.advantages(column.view(2, 4), 2).flatten())
    assert trainer._metrics["train"] == {"pass@1": [approx(6 / 16)], "pass@2": [approx((5 / 6 + 1 / 2 + 1 + 0) / 4)]}
    trainer.model.eval()
    assert trainer._calculate_rewards() is given


def test_verls_function_groups_by_index_and_agrees_with_its_own_estimate():
    rewards = torch.zeros(9, 3)
    rewards[[0, 2, 4], [2, 1, 2]] = 1
    index = np.array([*"abacbabbc"], dtype=object)  # a and b of unlike numbers; c is never right
    mask = torch.ones(9, 3)
    mask[2, 2] = 0
    given, returns = own.verl_advantages(token_level_rewards=rewards, response_mask=mask, index=index, N=2, config=None)
    expected = torch.zeros(9)
    for name in "abc":
        tries = [i for i, problem in enumerate(index) if problem == name]
        expected[tries] = len(tries) * own.advantages(rewards[tries].sum(dim=1)[None], 2)[0]
    assert_close(given, expected[:, None] * mask)
    assert_close(returns, given)
    try:
        from verl.trainer.ppo import core_algos as algos
    except ImportError:
        pytest.skip("verl is not installed")
    algos.register_adv_est("pass_at_n")(own.verl_advantages)
    index, one = np.array([*"aaaabbbb"], dtype=object), torch.zeros(8, 3)
    one[[1, 4, 5], 2] = 1
    ours, theirs = (algos.get_adv_estimator_fn(name)(
        token_level_rewards=one, response_mask=torch.ones(8, 3), index=index, config={"norm_adv_by_std_in_grpo": False},
        **more)[0] for name, more in (("pass_at_n", {"N": 4}), ("grpo_passk", {})))
    assert_close(ours, 4 * theirs)


def weighted(folder, model, N, n, tries, prompts, rows=None, **settings):
    """TRL's trainer on given tries, the tokens of which all processes share in turn. Right is the try [1, 1]."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def tries_of_this_process(given, trainer):
        start = trainer.accelerator.process_index * len(given)
        own_tries = tries[start:start + len(given)]
        return {"prompt_ids": [[ord(text) - 64] for text in given], "completion_ids": own_tries,
                "logprobs": [[0.0] * len(tokens) for tokens in own_tries]}

    def is_right(completion_ids, **_):
        return [float(tokens == [1, 1]) for tokens in completion_ids]

    args = trl.GRPOConfig(str(folder), **QUIET | {
        "scale_rewards": "none", "loss_type": "dr_grpo", "num_generations": n, "max_completion_length": 2,
        "shuffle_dataset": False, "per_device_train_batch_size": rows or len(tries), "logging_steps": 1} | settings)
    trainer, data = type("PassAtNTrainer", (own.PassAtN, trl.GRPOTrainer), {"N": N}), {"prompt": [*prompts]}
    return trainer(model, is_right, args, train_dataset=datasets.Dataset.from_dict(data), processing_class=characters(),
                   rollout_func=tries_of_this_process)


@parametrize("N", [1, 2, 3])
def test_the_gradient_of_a_step_is_the_exact_one_times_what_the_groups_mean_makes_of_it(N, tmp_path, monkeypatch):
    """A try is two tokens, each of two, all equally likely: p = 1/4. Here is each of the 64 groups of three, once."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    model, n, p = tiny_llama(vocab_size=2), 3, 0.25
    torch.nn.init.zeros_(model.lm_head.weight)
    by_hand = copy.deepcopy(model)
    tries = [[*tokens] for group in product(product((0, 1), repeat=2), repeat=n) for tokens in group]
    trainer = weighted(tmp_path, model, N, n, tries, "A" * 64, max_steps=1)
    trainer.train()
    value = pass_at_n(log_p_by_hand(by_hand, torch.tensor([1, 1, 1]), 2).exp(), N)
    assert value.item() == approx(1 - (1 - p)**N)
    gradient = torch.autograd.grad(value, by_hand.lm_head.weight)[0]
    factor = 1 - 1 / n + (N - 1) * p / ((1 - p) * n)
    assert gradient.abs().max() > 0.01
    by_trl = gradient / 2  # dr_grpo divides by max_completion_length
    assert_close(model.lm_head.weight, 0.5 * factor * by_trl, rtol=1e-4, atol=1e-6)
    logged = trainer.state.log_history[0]
    assert logged["pass@1"] == approx(p) and logged[f"pass@{N}"] == approx(value.item())


@parametrize("changes, hint", [
    ({"scale_rewards": "group"}, "cancels the weights"), ({"loss_type": "dapo"}, "numbers of tokens"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "cancels the weights"),
    ({"num_generations": 4}, "at most the number")])
def test_settings_of_trl_that_undo_the_weights_are_refused(changes, hint, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with pytest.raises(ValueError, match=hint):
        weighted(tmp_path, tiny_llama(2), 8, 8, [[0, 1]] * 8, "AA", **changes).train()


# ---- processes, the program and the README ---------------------------------------------------------------


def train_by_both(folder, processes):
    """Three steps of each recipe. The second of three groups of eight tries is shared by the two processes."""
    rows = [(torch.cat([torch.tensor([2, 3]), text[:4]]), length) for text, length in texts(12)]
    first, second = tiny_llama(), tiny_llama()
    limited("transformers", folder, first, rows, per_device_train_batch_size=4 // processes, num_train_epochs=1).train()
    torch.manual_seed(2)
    tries = [[1, 1] if right else [1, 2] for right in (torch.rand(24) < 0.3).tolist()]
    weighted(folder, second, 3, 8, tries, "BCDEFGHIJ", rows=24 // processes, max_steps=3).train()
    return [{name: value.detach().clone() for name, value in model.named_parameters()} for model in (first, second)]


def test_two_processes_end_with_the_parameters_of_one(tmp_path, monkeypatch):
    for package in ("transformers", "accelerate", "datasets", "trl"):
        pytest.importorskip(package)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, __file__, "two.pt"], cwd=tmp_path, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    start = tiny_llama()
    for alone, together in zip(train_by_both(tmp_path, 1), torch.load(tmp_path / "two.pt")):
        for name, value in alone.items():
            assert_close(together[name], value, rtol=0, atol=1e-5)
        assert max((value - start.get_parameter(name)).abs().max() for name, value in alone.items()) > 1e-3


def test_a_missing_package_gets_one_line(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('no transformers here')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, own.__file__, "sft"], env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install transformers" in done.stderr


@parametrize("recipe, titles", [
    ("sft", ["cross-entropy", "limited, N = 64"]), ("grpo", ["plain GRPO", "weights, N = 8"])])
def test_the_program_prints_both_curves(recipe, titles, tmp_path, monkeypatch, capsys):
    for package in ("transformers", "accelerate") if recipe == "sft" else ("trl", "datasets"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    show = own.show
    monkeypatch.setattr(own, "show", lambda *given, **settings: show(*given, **settings | {"max_steps": 2}))
    getattr(own, recipe)()
    form = re.compile(r"(.+): step (\d), pass@1 (0\.\d+), pass@\d+ (0\.\d+)")
    lines = [line for line in map(form.fullmatch, capsys.readouterr().out.splitlines()) if line]
    assert [(line[1], line[2]) for line in lines] == [(title, step) for title in titles for step in "12"]
    assert all(float(line[3]) <= float(line[4]) for line in lines)


@parametrize("arguments", [[], ["ppo"], ["sft", "grpo"]])
def test_the_program_says_in_a_line_what_it_wants(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [own.__file__, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(own.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "usage" in said and said.count("\n") == 1


def test_the_readmes_pieces_are_parts_of_the_file():
    section = README.split("## In your own training\n")[1].split("\n## ")[0]
    code, pieces = Path(own.__file__).read_text(encoding="utf-8"), re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(pieces) == 2 and all(piece.strip("\n") in code for piece in pieces)
    assert "exercises/own_training.py" in section and len(re.sub(r"```.*?```", "", section, flags=re.S).split()) <= 250


if __name__ == "__main__":
    trained = train_by_both("out", 2)
    if os.environ["RANK"] == "0":
        torch.save(trained, sys.argv[1])
