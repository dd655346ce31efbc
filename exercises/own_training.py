"""The limited loss and the weights for pass@N in your own training. Copy what you need, with passn.py and toy_tasks.py.

    python exercises/own_training.py sft     # see it work: a tiny model, by cross-entropy and by LimitedLoss
    python exercises/own_training.py grpo    # by plain GRPO and by PassAtN; torchrun and accelerate launch do, too"""

import os
import sys

import torch
from torch.nn.functional import cross_entropy, pad

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the folder of passn.py
from passn import dco_loss, estimate_pass_at_n, fail, overconfidence_factor, pass_at_n, pass_at_n_weights
from toy_tasks import Multiply, require


def answer_log_p(logits, labels, is_text=None, max_length=None):
    """log p of each row's answer, (B,), from logits (B, ≥ T, vocab_size), labels (B, T), -100 at all but the answer's
    tokens, and the attention mask (B, T). Raises ValueError where a row is not a prompt and then one whole answer."""
    is_answer = labels != -100
    is_text = torch.ones_like(is_answer) if is_text is None else is_text.bool()
    starts = is_answer & ~pad(is_answer, (1, -1))
    require(is_answer.any(dim=1).all(), "a row has no answer: all its labels are -100")
    require((is_text & (is_text.cumsum(dim=1) > 1) | ~is_answer).all(), "a prompt or padding is not labelled -100")
    require((starts.sum(dim=1) == 1).all(), "a row has several answers, or one with a hole: unpack; a turn a row")
    require((is_text.sum(dim=1) < (max_length or torch.inf)).all(),
            "a row fills max_length; if it is cut, p is a prefix's: drop such rows, or raise max_length")
    row, place = is_answer.nonzero(as_tuple=True)
    logits = logits[:, -labels.shape[1]:][row, place - 1].float()  # from the end: virtual tokens may stand in front
    losses = cross_entropy(logits, labels[row, place], reduction="none")
    return -losses.new_zeros(len(labels)).index_add(0, row, losses)


class LimitedLoss:
    """In front of a trainer of decoder-only models: class LimitedTrainer(LimitedLoss, Trainer), or SFTTrainer."""
    N = 64
    pass_over = 0.1  # an answer with a smaller F counts as 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs | {"labels": None})
        max_length = getattr(self.args, "max_length", None)  # SFTTrainer cuts there
        log_p = answer_log_p(outputs.logits, inputs["labels"], inputs.get("attention_mask"), max_length)
        factor = overconfidence_factor(log_p.detach(), self.N)
        losses = dco_loss(log_p, self.N) * (factor >= self.pass_over)
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        self.factors += [factor.mean()] * model.training
        return (loss, outputs) if return_outputs else loss

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        require(self.args.label_smoothing_factor == 0, "set label_smoothing_factor to 0: it is no part of this loss")
        self.model_accepts_loss_kwargs = False  # so that Trainer divides by the number of batches in a step
        self.factors = []

    def get_batch_samples(self, *args):  # the batches of a step, and their mean number of rows: the last may have fewer
        batches, _ = super().get_batch_samples(*args)
        rows = torch.tensor([float(len(batch["labels"])) for batch in batches], device=self.args.device)
        return batches, self.accelerator.gather(rows).mean()

    def log(self, logs, *args):
        if "loss" in logs:
            logs["F"] = self.accelerator.gather(torch.stack(self.factors)).mean().item()
            self.factors = []
        super().log(logs, *args)


def advantages(rewards, N):
    """Weights of tries in the gradient of pass@N, to sum over tries. rewards: (problems, tries), 0 or 1."""
    n = rewards.shape[1]
    require(((rewards == 0) | (rewards == 1)).all(), "rewards are 0 or 1: pass@N asks whether a try is right")
    require(N <= n, f"N = {N}, but {n} tries: N is at most the number of tries; well below it is better")
    return pass_at_n_weights(n, rewards.sum(dim=1), N)[:, None].float().to(rewards.device) * rewards


class PassAtN:
    """In front of TRL's trainer: class PassAtNTrainer(PassAtN, GRPOTrainer). Reward functions count one by one."""
    N = 8

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)  # (tries, functions), of all processes, group after group
        if not self.model.training:
            return rewards
        n, groups = self.num_generations, rewards.T.reshape(-1, self.num_generations)
        weighted = n * advantages(groups, self.N)  # n, since TRL takes the mean over tries
        for k in {1, self.N}:
            self._metrics["train"][f"pass@{k}"].append(estimate_pass_at_n(n, groups.sum(dim=1), k).mean().item())
        return weighted.reshape(rewards.T.shape).T

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        is_scaled = self.scale_rewards != "none" or self.multi_objective_aggregation != "sum_then_normalize"
        require(not is_scaled, 'set scale_rewards="none": dividing by the standard deviation cancels the weights')
        require(self.loss_type == "dr_grpo", 'set loss_type="dr_grpo": the others divide by numbers of tokens')


def verl_advantages(token_level_rewards, response_mask, index, N=8, **_):
    """The same for verl: register_adv_est("pass_at_n")(verl_advantages). Rows of one index are tries at one problem."""
    result = torch.zeros_like(token_level_rewards)
    for tries in (torch.as_tensor(index == problem, device=result.device) for problem in {*index}):
        result[tries] = tries.sum() * advantages(token_level_rewards[None, tries].sum(dim=2), N).T * response_mask[tries]
    return result, result


def show(title, N, tries, tokens, labels, bases, config, rows, data, **settings):
    from transformers import GPT2Config, GPT2LMHeadModel
    def log(self, logs, *_):
        if "loss" in logs and self.is_world_process_zero():
            p = answer_log_p(model(tokens).logits, labels).detach().exp()
            shown = (f"pass@{n} {pass_at_n(p, n).mean():.3f}" for n in (1, tries))
            print(f"{title}: step {self.state.global_step}", *shown, sep=", ", flush=True)
    torch.set_num_threads(1)  # more are slower
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 48, "n_layer": 2, "n_head": 4, "initializer_range": 0.05}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    args = config("out", per_device_train_batch_size=rows // int(os.environ.get("WORLD_SIZE", 1)), report_to="none",
                  use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, logging_steps=0.125, **settings)
    type("Recipe", bases, {"N": N, "log": log})(model, args=args, **data).train()


def sft():
    from transformers import Trainer, TrainingArguments
    task = Multiply(num_train=1000, num_test=500)
    data = [{"input_ids": torch.cat([prompt, answer]), "labels": pad(answer, (6, 0), value=-100)}
            for prompt, answer in zip(*task.train)]
    test = torch.cat(task.test, dim=1), pad(task.test[1], (6, 0), value=-100)
    for title, N in (("cross-entropy", 1), ("limited, N = 64", 64)):
        show(title, N, 64, *test, (LimitedLoss, Trainer), TrainingArguments, 100, {"train_dataset": data},
             max_steps=800, learning_rate=4e-3)


def grpo():  # a question, and of 12 letters the r-th is the right answer 12 // r times
    from datasets import Dataset
    from transformers import GPT2Tokenizer
    from trl import GRPOConfig, GRPOTrainer
    labels = torch.tensor([[-100, 7 + r] for r in range(1, 13) for _ in range(12 // r)])
    data = {"train_dataset": Dataset.from_dict({"prompt": ["B"] * len(labels), "answer": labels[:, 1].tolist()}),
            "reward_funcs": lambda completion_ids, answer, **_: [[y] == x for x, y in zip(completion_ids, answer)],
            "processing_class": GPT2Tokenizer({chr(64 + i): i for i in range(20)}, [], pad_token="@", eos_token="A")}
    settings = {"max_steps": 80, "learning_rate": 1e-2, "num_generations": 32, "max_completion_length": 1}
    show("plain GRPO", 8, 8, labels.clamp(min=2), labels, (GRPOTrainer,), GRPOConfig, 256, data, **settings)
    settings |= {"scale_rewards": "none", "loss_type": "dr_grpo"}
    show("weights, N = 8", 8, 8, labels.clamp(min=2), labels, (PassAtN, GRPOTrainer), GRPOConfig, 256, data, **settings)


if __name__ == "__main__":
    recipe = {"sft": sft, "grpo": grpo}.get(" ".join(sys.argv[1:]))
    try:
        recipe() if recipe else fail("usage: python exercises/own_training.py sft (or grpo)")
    except ImportError as error:
        fail(f"{error}; pip install transformers accelerate trl")
