"""The recipes against steps by hand, tries of `generate`, exact gradients, and with what they refuse."""

import copy
import os
import re
import runpy
import sys
from itertools import product
from math import comb
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}

import pytest
import torch
from pytest import approx
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

import own_training as own  # it puts the folder of passn.py on the path
from passn import dco_loss, overconfidence_factor, pass_at_n

transformers, trl, peft, datasets, accelerate, tokenizers = map(
    pytest.importorskip, ("transformers", "trl", "peft", "datasets", "accelerate", "tokenizers"))
torch.set_num_threads(1)
parametrize = pytest.mark.parametrize
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
         "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0, "logging_steps": 1}
# Prompts and answers, of which A is the end token, 1; the chat template labels what follows it, a B.
ROWS = [("BDFHJ", "A"), ("CEG", "KA"), ("DRB", "BCA"), ("EEHI", "A"), ("FGB", "HA"), ("GGI", "DDA"), ("HQK", "A")]
CHAT = ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}AB{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}")


def tiny_llama(vocab_size=20, **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab_size, **shape | changes))


def letters():
    tokens, how = {chr(64 + i): i for i in range(20)}, {"padding_side": "left", "chat_template": CHAT}
    return transformers.GPT2Tokenizer(tokens, [], unk_token="@", pad_token="@", bos_token="A", eos_token="A", **how)


def ids_of(text):
    return [ord(letter) - 64 for letter in text]


def share_of_right_tries(model, prompt, answer, number, ends):
    given = torch.tensor([prompt] * number)
    tries = model.generate(given, attention_mask=torch.ones_like(given), do_sample=True, top_k=0, eos_token_id=ends,
                           pad_token_id=0, max_new_tokens=len(answer))
    return (tries[:, len(prompt):] == torch.tensor(answer)).all(dim=1).double().mean().item()


def p_of(model, tokenizer, ids, labels, mask=None, end_tokens=None, **args):
    """What LimitedLoss makes of a row: p, or what it refuses it for."""
    class Base:
        def __init__(self):
            self.args, self.compute_loss_func = SimpleNamespace(label_smoothing_factor=0, **args), None
            self.model, self.processing_class, self.chat_template = model, tokenizer, None
    recipe = type("Recipe", (own.LimitedLoss, Base), {"N": 1, "end_tokens": end_tokens})()
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    try:
        return recipe.compute_loss(model, inputs).neg().exp().item()
    except ValueError as error:
        return str(error)


@torch.no_grad()
def test_p_is_the_share_of_tries_that_stop_at_the_end_token():
    shape = {"vocab_size": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=1)).eval()
    row = torch.tensor([[5, 6, 3, 1, 2]]), torch.tensor([[-100, -100, 3, 1, 2]])
    p, of_all_labels = (p_of(model, None, *row, end_tokens=ends) for ends in (None, ()))
    assert (p, of_all_labels) == (approx(0.01283, abs=5e-6), approx(0.000375, abs=5e-7))
    assert share_of_right_tries(model, [5, 6], [3, 1], 20_000, 1) == approx(p, abs=0.003)  # four standard errors


@parametrize("labels, mask, of_model, of_tokenizer, of_class, right", [
    ([-100, -100, 3, 4], None, 1, 4, (), 2), ([-100, 3, 1, 2], None, 1, 2, None, 2),
    ([-100, 3, 7, 1], None, 1, 7, None, 3), ([-100, 3, 7, 1], None, [1, 7], None, None, 2),
    ([-100, 3, 7, 1], None, None, 7, None, 2), ([-100, 3, 7, 1], None, 1, 1, [7], 2),
    ([-100, -100, 3, 1], [0, 1, 1, 1], 1, None, None, 2), ([-100, 3, 1, -100], [1, 1, 1, 0], 1, None, None, 2),
    ([-100, -100, 3, -100], None, 0, 0, None, "no end token"),  # pad = eos, and labels of padding overwritten
    ([-100, 3, 4, 5], None, [1, 7], 5, None, "no end token"), ([-100] * 4, None, 1, 1, None, "no answer"),
    ([-100, 3, 1, 2], None, None, None, None, "set end_tokens"), ([2, 3, 4, 1], None, 1, 1, None, "not labelled -100"),
    ([-100, 3, 1, 0], [1, 1, 1, 0], 1, 1, None, "not labelled -100"), ([-100, 1, -100, 1], None, 1, 1, None, "several"),
    ([-100, -100, 4, 1], [0, 0, 1, 1], 1, 1, None, "not labelled"), ([-100, 3, -100, 1], None, 1, 1, None, "a hole")])
def test_an_answer_is_what_is_labelled_up_to_its_first_end_token(labels, mask, of_model, of_tokenizer, of_class, right):
    """Eight tokens are equally likely, so p is 8 to the minus number of tokens. Two virtual tokens stand in front."""
    def model(**_):
        return SimpleNamespace(logits=torch.zeros(1, 6, 8))
    model.generation_config, model.training = SimpleNamespace(eos_token_id=of_model), False
    labels, mask = torch.tensor([labels]), None if mask is None else torch.tensor([mask])
    p = p_of(model, SimpleNamespace(eos_token_id=of_tokenizer), labels, labels, mask, of_class)
    assert right in p if isinstance(right, str) else p == approx(8.0**-right)


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
          "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ENDS = {"<eos>", "</s>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot_id|>", "<|eot|>", "<|user|>",
        "<|return|>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"}


def chat(template, is_made_of_blocks):
    """A tokenizer of tags, words and signs; a row with its assistant's labels; the prompt that `generate` has."""
    pattern = r"<[^<>\s]+>|\w+|\W"
    words = dict.fromkeys(["<unk>", "<eos>", "\n", "7", "assistant", *re.findall(pattern, template)])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", chat_template=template)
    content = [{"type": "text", "text": "7"}] if is_made_of_blocks else "7"
    turns = [{"role": role, "content": content} for role in ("user", "assistant")]
    row = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    left_out = max(0, len(prompt) - 30)  # of a long system prompt
    return tokenizer, row["input_ids"][left_out:], row["assistant_masks"][left_out:], prompt[left_out:]


def test_with_trls_templates_p_is_the_share_of_right_tries_or_is_refused():
    """By assistant_only_loss, and by prompt and completion, which TRL parts where the prompt and the row differ."""
    shipped = {file.stem[:-9]: file.read_text(encoding="utf-8")
               for file in (Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja")}
    for name, template in ({"chatml": CHATML} | shipped).items():
        tokenizer, ids, mask, prompt = chat(template, name in ("idefics3", "llava_next", "smolvlm"))
        start, ends = len(os.path.commonprefix([ids, prompt])), [*map(tokenizer.vocab.get, ENDS & {*tokenizer.vocab})]
        model, tokens = tiny_llama(len(tokenizer), eos_token_id=ends), torch.tensor([ids])
        completion, by_mask = tokens.clone(), tokens.masked_fill(torch.tensor([mask]) == 0, -100)
        completion[:, :start] = -100
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        while (loss := model(tokens, labels=completion).loss) > 0.5:  # per token; what follows the end token, too
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        p = p_of(model, tokenizer, tokens, completion)
        by_assistant = p_of(model, tokenizer, tokens, by_mask, assistant_only_loss=True)
        answer = ids[start:1 + next(t for t, token in enumerate(ids) if t >= start and token in ends)]
        share = share_of_right_tries(model, prompt, answer, 1000, ends)
        print(f"{name}: assistant_only_loss {by_assistant}, completion {p:.4f}, share of right tries {share:.4f}")
        if start == len(prompt):  # else TRL warns
            assert share == approx(p, abs=5 * (p * (1 - p) / 1000)**0.5), name
        assert by_assistant == approx(p) if ids[:mask.index(1)] == prompt else "begin elsewhere" in by_assistant, name
    assert len(shipped) > 10


def limited(kind, folder, model, **settings):
    """A trainer on ROWS as labels for Trainer, padded on the left, or as another kind for SFTTrainer."""
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer[:-1]}]
             for prompt, answer in ROWS]
    data = {"labels": [{"input_ids": ids_of(prompt + answer + "B"),
                        "labels": [-100] * len(prompt) + ids_of(answer + "B")} for prompt, answer in ROWS],
            "text": [{"prompt": prompt, "completion": answer[:-1]} for prompt, answer in ROWS],
            "chat": [{"prompt": both[:1], "completion": both[1:]} for both in turns],
            "messages": [{"messages": both} for both in turns]}[kind]
    data = datasets.Dataset.from_list(data)
    base, config, more = trl.SFTTrainer, trl.SFTConfig, {}
    if kind == "messages":
        settings = {"assistant_only_loss": True} | settings
    if kind == "labels":
        base, config = transformers.Trainer, transformers.TrainingArguments
        more["data_collator"] = transformers.DataCollatorForSeq2Seq(letters())
    args = config(str(folder), train_sampling_strategy="sequential", **QUIET | {"num_train_epochs": 1} | settings)
    recipe = type("LimitedTrainer", (own.LimitedLoss, base), {"N": 64, "pass_over": 0.7})
    return recipe(model, args, train_dataset=data, eval_dataset=data, processing_class=letters(), **more)


def by_hand(model, rows):
    log_p = []
    for prompt, answer in rows:
        ids = ids_of(prompt + answer)
        log_probs = model(torch.tensor([ids])).logits[0, -len(ids):].log_softmax(dim=1)  # behind virtual tokens
        log_p.append(sum(log_probs[t - 1, ids[t]] for t in range(len(prompt), len(ids))))
    factors = overconfidence_factor(torch.stack(log_p).detach(), 64)
    return (dco_loss(torch.stack(log_p), 64) * (factors >= 0.7)).mean(), factors


def after_steps_by_hand(model, *batches):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for rows in batches:
        optimizer.zero_grad()
        by_hand(model, rows)[0].backward()
        optimizer.step()
    return model


@parametrize("kind, batch, adapter", [
    ("labels", 1, None), ("labels", 4, None), ("text", 2, None), ("chat", 4, None), ("messages", 2, None),
    ("text", 1, {"num_virtual_tokens": 3}), ("labels", 2, {"r": 2, "target_modules": ["q_proj"]})])
def test_the_trainer_takes_the_steps_of_a_loop_by_hand(kind, batch, adapter, tmp_path):
    """Seven rows: the second step has three, in batches of two and one. Adapters are prompt tuning and LoRA."""
    model = tiny_llama()
    if adapter:
        tuning = peft.LoraConfig if "r" in adapter else peft.PromptTuningConfig
        model = peft.get_peft_model(model, tuning(task_type="CAUSAL_LM", **adapter))
    start, factors = parameters_to_vector(model.parameters()).detach(), by_hand(model, ROWS[:4])[1]
    expected = after_steps_by_hand(model, ROWS[:4], ROWS[4:])
    trainer = limited(kind, tmp_path, model, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch)
    trainer.log({"loss": 1.0}, start_time=None)
    trainer.train()
    trained = parameters_to_vector(model.parameters())
    assert_close(trained, parameters_to_vector(expected.parameters()), rtol=1e-4, atol=1e-5)
    assert not trained.equal(start)
    assert trainer.evaluate()["eval_loss"] == approx(by_hand(expected, ROWS)[0].item(), rel=1e-4)
    assert trainer.factors == [] and trainer.state.log_history[0]["F"] == approx(factors.mean().item(), rel=1e-4)
    assert adapter or 0 < (factors < 0.7).sum() < 4


@parametrize("recipe, changes, hint", [
    (own.LimitedLoss, {"label_smoothing_factor": 0.1}, "no label_smoothing_factor"),
    (own.LimitedLoss, {"loss_type": "dft"}, '"dft"'), (own.LimitedLoss, {"compute_loss_func": print}, "compute_loss"),
    (own.PassAtN, {"scale_rewards": "group"}, "cancels"), (own.PassAtN, {"loss_type": "dapo"}, "numbers of tokens"),
    (own.PassAtN, {"multi_objective_aggregation": "normalize_then_sum"}, "cancels")])
def test_settings_that_another_loss_would_read_are_refused(recipe, changes, hint):
    values = {"label_smoothing_factor": 0, "compute_loss_func": None, "loss_type": "dr_grpo", "scale_rewards": "none",
              "multi_objective_aggregation": "sum_then_normalize"} | changes
    base = type("Base", (), values | {"args": SimpleNamespace(**values)})
    with pytest.raises(ValueError, match=hint):
        type("Recipe", (recipe, base), {})()


def test_verls_function_groups_by_index_and_leaves_out_what_has_lost_tries():
    rewards, mask, names = torch.zeros(9, 3), torch.ones(9, 3), "abacbabbd"
    rewards[[0, 2, 4, 8], [2, 1, 2, 2]], mask[2, 2] = 1, 0
    expected = torch.tensor([1.0, 0, 1, 0, 2, 0, 0, 0, 0])[:, None] * mask  # n · N/n · C(n - c, 1)/C(n - 1, 1)
    for index in ([*names], (*names,), ids_of(names), torch.tensor(ids_of(names))):
        how = {"token_level_rewards": rewards, "response_mask": mask, "index": index, "config": None}
        given, returns = own.verl_advantages(**how, N=2)
        assert given.equal(expected) and returns.equal(expected)
    for wrong, N, hint in ((-1, 2, "0 or 1"), (0.5, 2, "0 or 1"), (torch.nan, 2, "not None"), (1, 5, "samples")):
        with pytest.raises(ValueError, match=hint):
            own.verl_advantages(torch.tensor([[wrong], [1], [0], [0.0]]), torch.ones(4, 1), [*"aaaa"], N)


def grpo(folder, model, **settings):
    """TRL's trainer on given tries of two tokens, shared by all processes: each of the 64 groups of three, once. The
    first of two reward functions calls [1, 1] right, the other nothing."""
    tries = [[*tokens] for group in product(product((0, 1), repeat=2), repeat=3) for tokens in group]

    def given_tries(prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        return {"prompt_ids": [[1]] * len(prompts), "completion_ids": tries[first:first + len(prompts)],
                "logprobs": [[0.0, 0.0]] * len(prompts)}

    rewards = [lambda completion_ids, right=right, **_: [float(tokens == right) for tokens in completion_ids]
               for right in ([1, 1], [])]
    args = trl.GRPOConfig(str(folder), **QUIET, scale_rewards="none", loss_type="dr_grpo", num_generations=3,
                          max_steps=1, max_completion_length=2, **settings)
    return type("PassAtNTrainer", (own.PassAtN, trl.GRPOTrainer), {"N": 2})(
        model, rewards, args, train_dataset=datasets.Dataset.from_dict({"prompt": ["A"] * 64}),
        processing_class=letters(), rollout_func=given_tries)


def train_by_both(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    llama, even = tiny_llama(), tiny_llama(vocab_size=2)
    torch.nn.init.zeros_(even.lm_head.weight)  # p of two tokens is 1/4
    limited("labels", folder, llama, per_device_train_batch_size=2, max_steps=1).train()
    trainer = grpo(folder, even, per_device_train_batch_size=96)
    trainer.train()
    trainer.model.eval()
    evaluated = trainer._calculate_rewards(*[[{}] * 3] * 2, [[[1]]] * 3, [[1, 1], [1, 0], [0, 0]])
    if rank == 0:
        llama, even = parameters_to_vector(llama.parameters()).detach(), even.lm_head.weight.data
        torch.save((llama, even, trainer.state.log_history[0], evaluated), folder / "two.pt")


def test_two_processes_take_the_steps_by_hand_and_follow_the_exact_gradient(tmp_path):
    port = 20000 + os.getpid() % 20000
    torch.multiprocessing.start_processes(train_by_both, (tmp_path, port), 2, start_method="fork")
    llama, weight, logged, evaluated = torch.load(tmp_path / "two.pt")
    expected = after_steps_by_hand(tiny_llama(), ROWS[:4])
    assert_close(llama, parameters_to_vector(expected.parameters()), rtol=1e-4, atol=1e-5)
    model, n, N, p = tiny_llama(vocab_size=2), 3, 2, 0.25
    torch.nn.init.zeros_(model.lm_head.weight)
    log_probs = model(torch.tensor([[1, 1, 1]])).logits[0, :2].log_softmax(dim=1)[:, 1]
    value = pass_at_n(log_probs.sum().exp(), N)
    gradient = torch.autograd.grad(value, model.lm_head.weight)[0] / 2  # dr_grpo divides by max_completion_length
    factor = 1 - 1 / n + (N - 1) * p / ((1 - p) * n)  # of the group's mean
    assert_close(weight, 0.5 * factor * gradient, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 0.01 and evaluated[:, 0].tolist() == [1, 0, 0] * 2
    assert logged["pass@1"] == approx(p / 2) and logged["pass@2"] == approx(value.item() / 2)  # of two functions


def test_the_program_prints_a_line_for_each_N_or_says_in_a_line_what_it_wants(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained = []
    monkeypatch.setattr(transformers.Trainer, "train", lambda self: trained.append(self.N))
    for recipe, first, last in (("sft", 1, 64), ("grpo", 1, 8)):
        own.demo(recipe)
        lines = re.findall(r"N = (\d+): pass@1 0.\d{3}, pass@(\d+) 0.\d{3}\n", capsys.readouterr().out)
        assert lines == [(f"{first}", f"{last}"), (f"{last}", f"{last}")]
    assert trained == [1, 64, 1, 8]
    monkeypatch.setitem(sys.modules, "trl", None)
    for arguments, hint in (([], "usage"), (["ppo"], "usage"), (["sft", "grpo"], "usage"), (["sft"], "pip install")):
        monkeypatch.setattr(sys, "argv", [own.__file__, *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(own.__file__, run_name="__main__")
        said = capsys.readouterr().err
        assert stop.value.code == 2 and hint in said and said.count("\n") == 1
