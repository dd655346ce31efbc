"""The limited loss and the weights for pass@N in your own training. Copy what you need, with passn.py and toy_tasks.py.

    python exercises/own_training.py sft     # see it work: a tiny model, with N = 1 (cross-entropy) and N = 64
    python exercises/own_training.py grpo    # the same with N = 1 (the usual reward) and N = 8

SUPERVISED: class LimitedTrainer(LimitedLoss, SFTTrainer): N = 64, the number of tries in the test; or before Trainer. A
row is a prompt and one answer, labelled -100 but at the answer's tokens. TRL makes such rows of prompt and completion,
text or chat, and with some chat templates by assistant_only_loss; with others that is refused. A try begins where the
labels do and stops at its first end token. Labels behind it do not count: 22 of TRL 1.16's 31 templates label a newline
there. An answer without one is refused. With end_tokens = () all labels count, and cut answers go unnoticed. Heed TRL's
warning of a prompt that is no prefix: `generate` begins elsewhere then. The mean of F is logged. If it stays near 1,
this is cross-entropy, as for long answers: at p = e^-100, F is 1. For them let p be the chance that a try ends right,
from samples (as in `cot`), or use rewards, or, as the paper's code does, cross-entropy on problems of which less than a
tenth of 64 samples are right. Adam's epsilon is 1e-8 in `sft` and `grpo`, and was 1e-3 for the README's pretrained
model. The checks of dco_loss read values: torch.compile breaks its graph there, torch.func.vmap fails.

REINFORCEMENT: class PassAtNTrainer(PassAtN, GRPOTrainer): N = 8, at most the number n of tries at a problem, and well
below is better: with N = n only a try that alone is right pulls. The weights are PKPO's `sloo_minus_one` (arXiv
2505.15201): its basic weights minus N/n times the leave-one-out pass@(N - 1). TRL subtracts the group's mean, too: that
multiplies the expected gradient by 1 - 1/n + (N - 1) p / ((1 - p) n). In verl, a module that VERL_USE_EXTERNAL_MODULES
names calls register_adv_est("pass_at_n")(verl_advantages); set loss_agg_mode=seq-mean-token-sum.
To measure: estimate_pass_at_n, from N or more samples. p is that of temperature=1, top_k=0, top_p=1."""

import os
import sys

import torch
from torch.nn.functional import cross_entropy, pad

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the folder of passn.py
from passn import dco_loss, estimate_pass_at_n, fail, overconfidence_factor, pass_at_n, pass_at_n_weights
from toy_tasks import TASKS, require


def answer_log_p(logits, labels, end_tokens, is_text=None):
    """log p of each row's answer, (B,), up to the first of its end tokens: a number, or several; () counts all labels.
    logits: (B, T or more, V); labels: (B, T), -100 at all but the answer's tokens; is_text: the attention mask."""
    require(end_tokens is not None, "neither model nor tokenizer has an end token: set end_tokens")
    is_answer = labels != -100
    is_text = torch.ones_like(is_answer) if is_text is None else is_text.bool()
    starts = is_answer & ~pad(is_answer, (1, -1))
    require((is_text & (is_text.cumsum(dim=1) > 1) | ~is_answer).all(), "a prompt or padding is not labelled -100")
    require((starts.sum(dim=1) == 1).all(), "a row has no answer, several, or one with a hole: unpack; a turn a row")
    if end_tokens != ():
        is_end = torch.isin(labels, torch.tensor(end_tokens, device=labels.device)).int()
        require(is_end.any(dim=1).all(), f"an answer has no end token ({end_tokens}): is it cut, is pad = eos, has "
                                         "the chat template another? With end_tokens = () all labels count")
        is_answer &= is_end.cumsum(dim=1) - is_end == 0
    row, place = is_answer.nonzero(as_tuple=True)
    logits = logits[:, -labels.shape[1]:][row, place - 1].float()  # from the end: virtual tokens may stand in front
    losses = cross_entropy(logits, labels[row, place], reduction="none")
    return -losses.new_zeros(len(labels)).index_add(0, row, losses)


class LimitedLoss:
    """In front of a trainer of decoder-only models: class LimitedTrainer(LimitedLoss, Trainer), or SFTTrainer."""
    N = 64
    pass_over = 0.1    # an answer with a smaller F counts as 0
    end_tokens = None  # those of the model's generation configuration, else of the tokenizer

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        others = self.args.label_smoothing_factor, self.compute_loss_func, getattr(self.args, "loss_type", "") == "dft"
        require(not any(others), 'this is a loss of its own: no label_smoothing_factor, compute_loss_func or "dft"')
        self.model_accepts_loss_kwargs = False  # so that Trainer divides by the number of batches in a step
        self.factors, self.prompt_end = [], []
        if getattr(self.args, "assistant_only_loss", False):  # where such labels begin, the template decides
            user, how = [{"role": "user", "content": "?"}], {"chat_template": self.chat_template, "return_dict": False}
            alone, prompt = (self.processing_class.apply_chat_template(user, add_generation_prompt=is_prompt, **how)
                             for is_prompt in (False, True))
            self.prompt_end = prompt[len(os.path.commonprefix([alone, prompt])):]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs | {"labels": None})
        ends = self.end_tokens
        for source in (getattr(self.model, "generation_config", None), self.processing_class):
            ends = getattr(source, "eos_token_id", None) if ends is None else ends
        log_p = answer_log_p(outputs.logits, inputs["labels"], ends, inputs.get("attention_mask"))
        starts, length = (inputs["labels"] != -100).int().argmax(dim=1), len(self.prompt_end)
        for ids, start in zip(inputs["input_ids"].tolist(), starts.tolist()):
            require(ids[start - length:start] == self.prompt_end, "this chat template's labels begin elsewhere than "
                    "`generate` does: give prompt and completion, and no assistant_only_loss")
        factor = overconfidence_factor(log_p.detach(), self.N)
        losses = dco_loss(log_p, self.N) * (factor >= self.pass_over)
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        self.factors += [factor.mean()] * model.training
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args):  # the batches of a step, and their mean number of rows: the last may have fewer
        batches, _ = super().get_batch_samples(*args)
        rows = torch.tensor([float(len(batch["labels"])) for batch in batches], device=self.args.device)
        return batches, self.accelerator.gather(rows).mean()

    def log(self, logs, *args, **options):
        if "loss" in logs and self.factors:
            logs["F"] = self.accelerator.gather(torch.stack(self.factors)).mean().item()
            self.factors = []
        super().log(logs, *args, **options)


def advantages(rewards, N):
    """Weights of tries in the gradient of pass@N, to sum over tries. rewards: (problems, tries), 0 or 1."""
    require(((rewards == 0) | (rewards == 1)).all(), "a reward is 0 or 1, not None: is this try right?")
    return pass_at_n_weights(rewards.shape[1], rewards.sum(dim=1), N)[:, None].float().to(rewards.device) * rewards


class PassAtN:
    """In front of TRL's trainer: class PassAtNTrainer(PassAtN, GRPOTrainer). Reward functions count one by one."""
    N = 8

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        is_scaled = self.scale_rewards != "none" or self.multi_objective_aggregation != "sum_then_normalize"
        require(not is_scaled, 'set scale_rewards="none": dividing by the standard deviation cancels the weights')
        require(self.loss_type == "dr_grpo", 'set loss_type="dr_grpo": the others divide by numbers of tokens')

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)  # (tries, functions), of all processes, group after group
        if not self.model.training:
            return rewards
        n, groups = self.num_generations, rewards.T.reshape(-1, self.num_generations)
        for k in {1, self.N}:
            self._metrics["train"][f"pass@{k}"].append(estimate_pass_at_n(n, groups.sum(dim=1), k).mean().item())
        return n * advantages(groups, self.N).reshape(rewards.T.shape).T  # n, since TRL takes the mean over tries


def verl_advantages(token_level_rewards, response_mask, index, N=8, **_):
    """The same for verl. Rows of one index are tries at one problem. A problem that lost tries, below N, weighs 0."""
    result, problems = torch.zeros_like(token_level_rewards), [str(problem) for problem in index]
    groups = [[row for row, other in enumerate(problems) if other == problem] for problem in {*problems}]
    for rows in groups:
        if len(rows) >= min(N, max(map(len, groups))):
            result[rows] = len(rows) * advantages(token_level_rewards[rows].sum(dim=1)[None], N).T * response_mask[rows]
    return result, result


def demo(name):
    import datasets, transformers, trl
    torch.set_num_threads(1)  # more are slower
    if name == "sft":  # products of two numbers: answers of four digits, without an end token
        task, recipe = TASKS["multiply"](0, num_train=1000, num_test=500), (LimitedLoss, transformers.Trainer)
        ids, labels = torch.cat(task.test, dim=1), pad(task.test[1], (6, 0), value=-100)
        train = zip(torch.cat(task.train, dim=1), pad(task.train[1], (6, 0), value=-100))
        data = {"train_dataset": [{"input_ids": row, "labels": row_labels} for row, row_labels in train]}
        config, settings, Ns = transformers.TrainingArguments, {"max_steps": 500, "learning_rate": 4e-3}, (1, 64)
    else:  # a question, and of 12 letters the r-th is the right answer 12 // r times
        labels = torch.tensor([[-100, 7 + r] for r in range(1, 13) for _ in range(12 // r)])
        ids, rows = labels.clamp(min=2), {"prompt": ["B"] * len(labels), "answer": labels[:, 1].tolist()}
        letters = transformers.GPT2Tokenizer({chr(64 + i): i for i in range(20)}, [], pad_token="@", eos_token="A")
        data = {"train_dataset": datasets.Dataset.from_dict(rows), "processing_class": letters,
                "reward_funcs": lambda completion_ids, answer, **_: [[y] == x for x, y in zip(completion_ids, answer)]}
        config, recipe, Ns = trl.GRPOConfig, (PassAtN, trl.GRPOTrainer), (1, 8)
        settings = {"max_steps": 80, "learning_rate": 1e-2, "num_generations": 32, "max_completion_length": 1,
                    "scale_rewards": "none", "loss_type": "dr_grpo"}
    for N in Ns:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=48, n_layer=2, n_head=4,
            initializer_range=0.05, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
        args = config("out", per_device_train_batch_size=128, use_cpu=True, bf16=False, report_to="none",
                      save_strategy="no", disable_tqdm=True, logging_steps=100, **settings)
        type("Recipe", recipe, {"N": N, "end_tokens": ()})(model, args=args, **data).train()
        p = answer_log_p(model(ids).logits, labels, ()).detach().exp()
        print(f"N = {N}: pass@1 {p.mean():.3f}, pass@{Ns[-1]} {pass_at_n(p, Ns[-1]).mean():.3f}", flush=True)


if __name__ == "__main__":
    try:
        demo(*sys.argv[1:]) if sys.argv[1:] in (["sft"], ["grpo"]) else fail("usage: own_training.py sft (or grpo)")
    except ImportError as error:
        fail(f"{error}; pip install transformers accelerate trl")
