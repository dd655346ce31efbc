"""The recipes against steps by hand, tries of `generate`, exact gradients, and what they refuse."""

import copy
import os
import re
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from pytest import approx, importorskip, mark, raises
from torch.testing import assert_close

import own_training as own  # it puts the folder of passn.py on the path
from passn import dco_loss, overconfidence_factor, pass_at_n

transformers, trl, peft, datasets, accelerate, tokenizers = map(
    importorskip, ("transformers", "trl", "peft", "datasets", "accelerate", "tokenizers"))
torch.set_num_threads(1)
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "num_train_epochs": 1,
         "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0, "logging_steps": 1}
# Prompts and answers, of which A is the end token, 1; the chat template labels what follows it, a B.
ROWS = [row.split() for row in ("BDFHJ A", "CEG KA", "DRB BCA", "EEHI A", "FGB HA", "GGI DDA", "HQK A")]
CHAT = "{{ messages[0].content }}{% generation %}{{ messages[1].content + 'AB' if messages[1] }}{% endgeneration %}"
LETTERS = transformers.GPT2Tokenizer({chr(64 + i): i for i in range(20)}, [], unk_token="@", pad_token="@",
                                     bos_token="A", eos_token="A", padding_side="left", chat_template=CHAT)
TEMPLATES = [*Path(trl.__file__).parent.glob("chat_templates/*_training.jinja")]


def tiny_llama(vocab_size=20, **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1} | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab_size, **shape))


def p_of(model, tokenizer, end_tokens=None, args={}, **row):
    """p of one row, or what LimitedLoss refuses it for. SimpleNamespace is what it reads of a trainer."""
    recipe = type("Recipe", (own.LimitedLoss, SimpleNamespace), {"N": 1, "end_tokens": end_tokens})
    args = SimpleNamespace(label_smoothing_factor=0, **args)
    trainer = {"model": model, "processing_class": tokenizer, "compute_loss_func": None, "chat_template": None}
    inputs = {name: torch.tensor([values]) for name, values in row.items()}
    try:
        return recipe(args=args, **trainer).compute_loss(model, inputs).neg().exp().item()
    except ValueError as error:
        return str(error)


@mark.parametrize("labels, ends, right", [
    (".312", (1, 2), 2), (".371", (1, 7), 3), (".371", ([1, 7], None), 2), (".312", (1, 2, ()), 3),
    (".312", (1, 1, [2]), 3), (".371", (None, 7), 2), ("_.31", (1, 1), 2), (".31_", (1, 1), 2),
    ("..3_", (0, 0), "no end token"), (".345", ([1, 7], 5), "no end token"), (".312", (None, None), "set end_tokens"),
    ("....", (1, 1), "no answer"), (".310", (1, 1), "padding is not labelled"), ("__41", (1, 1), "a prompt or"),
    (".1.1", (1, 1), "several")])
def test_an_answer_is_what_is_labelled_up_to_its_first_end_token(labels, ends, right):
    """A dot is a prompt's token, _ and 0 are padding. End tokens are the model's, the tokenizer's and the recipe's.
    Eight tokens are equally likely: p is 8 to the minus number."""
    row = {"input_ids": [2] * 4, "labels": [-100 if label in "._" else int(label) for label in labels]}
    row["attention_mask"] = [int(label not in "_0") for label in labels]
    of_model, of_tokenizer, *given = ends
    model = tiny_llama(8, initializer_range=1e-9, eos_token_id=of_model)
    p = p_of(model, SimpleNamespace(eos_token_id=of_tokenizer), *given, **row)
    assert right in p if isinstance(right, str) else p == approx(8.0**-right)


@torch.no_grad()
@mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_with_trls_templates_p_is_the_share_of_right_tries_or_is_refused(file):
    """By assistant_only_loss, and by prompt and completion, which TRL parts, and warns, where prompt and row differ.
    Tokens are tags, words and signs, of a prompt the last 30; the end token follows the 7; ChatML is among them."""
    pattern, template = r"<[^<>\s]+>|\w+|\W", file.read_text(encoding="utf-8")
    words = dict.fromkeys(["<unk>", "<eos>", "\n", "7", "assistant", *re.findall(pattern, template)])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", chat_template=template)
    content = [{"type": "text", "text": "7"}] if re.match("idefics|llava|smolvlm", file.stem) else "7"
    turns = [{"role": role, "content": content} for role in ("user", "assistant")]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    row = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True)
    prompt, ids, _, is_labelled = (tokens[max(0, len(prompt) - 30):] for tokens in (prompt, *row.values()))
    start = len(os.path.commonprefix([ids, prompt]))
    end = len(ids) - ids[::-1].index(tokenizer.vocab["7"])
    model, answer = tiny_llama(len(tokenizer), eos_token_id=ids[end]), ids[start:end + 1]
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, start - 1:end]  # make the answer likely, not a \n
    model.lm_head.weight.data = 8 * (torch.linalg.pinv(hidden) @ torch.eye(len(tokenizer))[answer]).T
    p = p_of(model, tokenizer, input_ids=ids, labels=[-100] * start + ids[start:])
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": len(answer), "num_return_sequences": 1000}
    tries = model.generate(torch.tensor([ids[:start]]), attention_mask=torch.ones(1, start).long(), **how)
    share = (tries[:, start:] == torch.tensor(answer)).all(dim=1).double().mean()
    assert share == approx(p, abs=5 * (p * (1 - p) / 1000)**0.5) and p > 0.1 and len(TEMPLATES) > 10
    labels = [token if is_on else -100 for token, is_on in zip(ids, is_labelled)]
    by_assistant = p_of(model, tokenizer, args={"assistant_only_loss": True}, input_ids=ids, labels=labels)
    assert by_assistant == approx(p) if ids[:is_labelled.index(1)] == prompt else "begin elsewhere" in by_assistant


def limited(folder, model, kind="text", compute_loss_func=None, **settings):
    """A trainer on ROWS: of labels, padded on the left, is Trainer; of other kinds, padded on the right, SFTTrainer."""
    rows, config, base, collator = [], trl.SFTConfig, trl.SFTTrainer, None
    for prompt, answer in ROWS:
        ids, labels = LETTERS(prompt + answer + "B").input_ids, LETTERS(answer + "B").input_ids
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer[:-1]}]
        rows.append({"labels": {"input_ids": ids, "labels": [-100] * len(prompt) + labels},
                     "text": {"prompt": prompt, "completion": answer[:-1]}, "messages": {"messages": turns},
                     "chat": {"prompt": turns[:1], "completion": turns[1:]}}[kind])
    if kind == "labels":
        config, base = transformers.TrainingArguments, transformers.Trainer
        collator = transformers.DataCollatorForSeq2Seq(LETTERS)
    settings |= {"assistant_only_loss": True} if kind == "messages" else {}
    args = config(folder, train_sampling_strategy="sequential", **QUIET | settings)
    recipe, rows = type("Recipe", (own.LimitedLoss, base), {"pass_over": 0.7}), datasets.Dataset.from_list(rows)
    return recipe(model, args, collator, rows, rows, LETTERS, compute_loss_func=compute_loss_func)


def by_hand(model, rows):
    """The loss with N = 64 of an answer's cross-entropy, where F is at least 0.7, and the F."""
    log_p = []
    for prompt, answer in rows:
        ids = LETTERS(prompt + answer, return_tensors="pt").input_ids
        labels = ids.where(torch.arange(ids.shape[1]) >= len(prompt), -100)
        log_p.append(-len(answer) * model(ids, labels=labels).loss)
    factors = overconfidence_factor(torch.stack(log_p).detach(), 64)
    return (dco_loss(torch.stack(log_p), 64) * (factors >= 0.7)).mean(), factors


def after_steps_by_hand(model, *batches):
    model = copy.deepcopy(model)
    for rows in batches:
        model.zero_grad()
        by_hand(model, rows)[0].backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    return model


@mark.parametrize("kind, batch, adapter", [
    ("labels", 4, None), ("text", 2, None), ("chat", 4, None), ("messages", 2, None),
    ("text", 1, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    ("labels", 2, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))])
def test_the_trainer_takes_the_steps_of_a_loop_by_hand(kind, batch, adapter, tmp_path):
    """Seven rows: the second step has three, in batches of two and one."""
    model = peft.get_peft_model(tiny_llama(), adapter) if adapter else tiny_llama()
    loss, factors = by_hand(model, ROWS[:4])
    expected = after_steps_by_hand(model, ROWS[:4], ROWS[4:])
    trainer = limited(tmp_path, model, kind, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch)
    trainer.log({"loss": 1.0}, start_time=None)
    trainer.train()
    assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
    assert abs(by_hand(model, ROWS[:4])[0] - loss) > 0.5 and (adapter or 0 < (factors < 0.7).sum() < 4)
    assert trainer.evaluate()["eval_loss"] == approx(by_hand(expected, ROWS)[0].item(), rel=1e-4)
    assert trainer.factors == [] and trainer.state.log_history[0]["F"] == approx(factors.mean().item(), rel=1e-4)


def grpo(folder, model, **settings):
    """TRL's trainer on given tries of two tokens, shared by two processes: each of the 64 groups of three, once."""
    def given_tries(prompts, trainer):
        tries = torch.cartesian_prod(*[torch.arange(2)] * 6).reshape(2, 96, 2)[trainer.accelerator.process_index]
        return {"prompt_ids": [[1]] * 96, "completion_ids": tries.tolist(), "logprobs": [[0.0, 0.0]] * 96}
    rewards = [lambda completion_ids, y=y, **_: [float(ids == y) for ids in completion_ids] for y in ([1, 1], [])]
    how = {"num_generations": 3, "max_steps": 1, "max_completion_length": 2, "per_device_train_batch_size": 96}
    args = trl.GRPOConfig(folder, **QUIET | how | {"scale_rewards": "none", "loss_type": "dr_grpo"} | settings)
    rows = datasets.Dataset.from_list([{"prompt": "A"}] * 64)
    recipe = type("Recipe", (own.PassAtN, trl.GRPOTrainer), {"N": 2})
    return recipe(model, rewards, args, rows, processing_class=LETTERS, rollout_func=given_tries)


@mark.parametrize("recipe, settings, hint", [
    (limited, {"label_smoothing_factor": 0.1}, "no label_smoothing_factor"), (limited, {"loss_type": "dft"}, '"dft"'),
    (limited, {"compute_loss_func": print}, "compute_loss"), (grpo, {"scale_rewards": "group"}, "cancels"),
    (grpo, {"multi_objective_aggregation": "normalize_then_sum"}, "cancels"), (grpo, {"loss_type": "dapo"}, "tokens")])
def test_settings_that_another_loss_would_read_are_refused(recipe, settings, hint, tmp_path):
    with raises(ValueError, match=hint):
        recipe(tmp_path, tiny_llama(), **settings)


def test_two_processes_take_the_steps_by_hand_and_follow_the_exact_gradient(tmp_path):
    """Of two equally likely tokens both must be right: p is 1/4. There are three tries, and N = 2."""
    llama, even, tokens = tiny_llama(), tiny_llama(2), torch.tensor([[1, 1, 1]])
    expected = after_steps_by_hand(llama, ROWS[:4])
    even.lm_head.weight.data.zero_()
    value = pass_at_n((-2 * even(tokens, labels=tokens).loss).exp(), 2)
    gradient = torch.autograd.grad(value, even.lm_head.weight)[0] / 2  # dr_grpo divides by max_completion_length
    factor = 1 - 1 / 3 + 0.25 / (0.75 * 3)  # of the group's mean
    def train_and_check():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        limited(tmp_path, llama, "labels", per_device_train_batch_size=2, max_steps=1).train()
        assert_close(llama.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
        trainer = grpo(tmp_path, even)
        trainer.train()
        assert_close(even.lm_head.weight.data, 0.5 * factor * gradient, rtol=1e-4, atol=1e-6)
        logged = trainer.state.log_history[0]  # of two reward functions, one of which calls nothing right
        assert logged["pass@1"] == approx(0.25 / 2) and logged["pass@2"] == approx(value.item() / 2)
        trainer.model.eval()
        tries = [[1, 1], [1, 0], [0, 0]]
        assert trainer._calculate_rewards([{}] * 3, tries, tries, tries)[:, 0].tolist() == [1, 0, 0] * 2
    accelerate.debug_launcher(train_and_check, num_processes=2)


def test_verls_function_groups_by_index_and_leaves_out_what_has_lost_tries():
    rewards, mask, names = torch.zeros(9, 3), torch.ones(9, 3), "abacbabbd"
    rewards[[0, 2, 4, 8], [2, 1, 2, 2]], mask[2, 2] = 1, 0
    expected = torch.tensor([1.0, 0, 1, 0, 2, 0, 0, 0, 0])[:, None] * mask  # n · N/n · C(n - c, 1)/C(n - 1, 1)
    for index in ([*names], (*names,), [*names.encode()], torch.tensor([*names.encode()])):
        weights, returns = own.verl_advantages(rewards, response_mask=mask, index=index, config=None, N=2)
        assert weights.equal(expected) and returns.equal(expected)
    for wrong, hint in ((-1, "0 or 1"), (0.5, "0 or 1"), (torch.nan, "not None"), (1, "samples")):
        with raises(ValueError, match=hint):
            own.verl_advantages(torch.tensor([wrong, 1, 0, 0])[:, None], torch.ones(4, 1), "aaaa", N=5)
