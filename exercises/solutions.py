"""The experiments of the exercises, one function each. In the folder of passn.py:

    python exercises/solutions.py 8
    python exercises/solutions.py 8 --mine my_file.py --seeds 3

With --mine, functions that you wrote take the place of those in answers.py. Runs are read from the folder --out, and new
ones are saved there. A run that is there is not trained again."""

import argparse
import math
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of passn.py

import answers
import passn
from passn import COLUMNS, LOSSES, estimate_pass_at_n, fail, over_seeds, pass_at, pass_at_n, stack
from toy_tasks import DEAD_END, MAX_DEPTH, PROVED, TASKS, Multiply, Search, choose, join, log_policy

measure_all = passn.evaluate


def line(label, *cells):
    """Print a line of a table: texts as they are, numbers with three digits."""
    texts = (cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells)
    print(f"{label:38}", *(f"{text:>11}" for text in texts))


def evaluate_training(problems, model, loss, N):
    """What a run measures, and p of every training problem."""
    if isinstance(problems, Search):
        log_p = Search.log_p(problems, model, range(len(problems.train)))
    else:
        log_p = problems.log_p(model, torch.arange(problems.size))
    return measure_all(problems, model, loss, N) | {"all_train_p": log_p.exp().tolist()}


def runs(args, loss, N=64, task="multiply", with_training=False, **changes):
    """A row of runs with these settings, one for each seed: from the folder, or else trained now."""
    N = 1 if loss == "ce" else N
    changes |= {name: args.math_dir for name in TASKS[task].paths}
    config, row = passn.configure(task, loss, N=N, **changes), {}
    for run in sum(passn.load_runs(args.out, task, args.seeds), []):
        is_same = (run["loss"], run["N"]) == (loss, N) and run["config"].items() <= config.items()
        if is_same and (not with_training or "all_train_p" in run["history"][0]):
            row[run["seed"]] = run
    passn.evaluate = evaluate_training if with_training else measure_all
    for seed in args.seeds:
        row[seed] = row.get(seed) or passn.train(task, loss, N, seed, args.out, **changes)[0]
    return [row[seed] for seed in args.seeds]


def enter(args, name, *numbers):
    """Enter a function that students write in LOSSES. Returns its name there, which says whose it is."""
    loss = "-".join([f"my-{name}" if name in args.mine else name, *map(str, numbers)])
    LOSSES[loss] = lambda log_p, N: args.write[name](log_p, N, *numbers)
    return loss


def p_of(run, epoch=-1):
    return run["history"][epoch]["p"][0]  # at temperature 1


def header(title=""):
    line(title, "pass@1", "pass@64", "best@64", "confidence")


def show(args, *which, label="", **changes):
    """A line of a table: pass@1, pass@64 and confidence at the end, pass@64 in the best epoch; means over the seeds."""
    row = runs(args, *which, **changes)
    values = stack(row, 1)[:, -1, 0], stack(row, 64)[:, -1, 0], stack(row, 64)[..., 0].max(axis=1)
    line(label or row[0]["label"], *map(np.mean, values), passn.curve(row, "confidence")[:, -1].mean())
    return row


def difference(label, row, other):
    """One row minus another at the end, on the same seeds, for 1, 8 and 64 tries."""
    leads = (over_seeds((stack(row, n) - stack(other, n))[:, -1, 0]) for n in COLUMNS[:3])
    line(label, *("{:+.3f}±{:.3f}".format(*lead) for lead in leads))


def solution_1(args):
    row = runs(args, "ce")
    line("cross-entropy", "pass@1", "pass@64", "confidence")
    for i, record in enumerate(row[0]["history"]):
        line(f"epoch {record['epoch']}", *(stack(row, N)[:, i, 0].mean() for N in (1, 64)),
             passn.curve(row, "confidence")[:, i].mean())
    line("", "best epoch", "and T", "the end", "and T")
    for row in (row, runs(args, "limited")):
        pass_64 = stack(row, 64)
        end, best = pass_64[:, -1], pass_64[..., 0].max(axis=1)
        line(row[0]["label"], *map(np.mean, (best, pass_64.max(axis=(1, 2)), end[:, 0], end.max(axis=1))))


def solution_2(args):
    p = torch.tensor(p_of(runs(args, "limited")[0]), dtype=torch.float64)
    line("", "pass@64", "deviation")
    line("exact", pass_at_n(p, 64).mean())
    torch.manual_seed(0)
    for n in (64, 128, 512):
        num_right = torch.distributions.Binomial(n, p).sample([200])  # 200 times n samples of each problem
        unbiased = estimate_pass_at_n(n, num_right, 64).mean(dim=1)
        naive = pass_at_n(num_right / n, 64).mean(dim=1)
        line(f"{n} samples, unbiased", unbiased.mean(), unbiased.std())
        line(f"{n} samples, c/n for p", naive.mean(), naive.std())


def solution_6(args):
    header()
    for changes in ({}, {"epochs": 2 * passn.configure("multiply", "ce")["epochs"]}):
        for loss in ("ce", "limited", "root"):
            show(args, loss, **changes)
    without = [show(args, loss, pass_over=0.0) for loss in ("limited", "root")]
    line("at the end, paired", "pass@1", "pass@8", "pass@64")
    limited, root = (runs(args, loss) for loss in ("limited", "root"))
    difference("root minus limited", root, limited)
    difference("limited: passing over minus not", limited, without[0])
    difference("root: passing over minus not", root, without[1])


def solution_7(args):
    line("pass@64 in cross-entropy's best epoch", "training", "test", "limited:", "at its end")
    for task in ("multiply", "finetune", "prove"):
        row = runs(args, "ce", task=task, with_training=True)
        best = stack(row, 64)[..., 0].argmax(axis=1)
        in_training = [pass_at_n(run["history"][i]["all_train_p"], 64).mean() for run, i in zip(row, best)]
        limited = stack(runs(args, "limited", task=task), 64)[..., 0]
        line(task, np.mean(in_training), stack(row, 64)[..., 0].max(axis=1).mean(), "", limited[:, -1].mean())


def solution_8(args):
    header()
    show(args, "limited")
    show(args, "limited", pass_over=0.0)  # the others, too, pass over nothing
    for k in (1, 2, 4):
        show(args, enter(args, "hard_stop", k))


class Averaged(Multiply):
    """`multiply`, measured with a moving average (EMA) of the weights, over a hundred updates or so."""

    def new_model(self, GPT, *shape):
        model = super().new_model(GPT, *shape)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        return model

    def log_p(self, model, batch):
        if torch.is_grad_enabled():  # before each update
            self.average.update_parameters(model)
        return super().log_p(model, batch)

    def measure(self, model):
        return super().measure(self.average.module)


def solution_9(args):
    TASKS["averaged"] = Averaged
    header()
    show(args, "ce")
    show(args, "ce", task="averaged", label="cross-entropy, weights averaged")
    for changes in ({"weight_decay": 0.1}, {"weight_decay": 0.3}, {"n_embd": 32}):
        show(args, "ce", **changes)
    show(args, "limited")
    show(args, "limited", n_embd=32)


def solution_10(args):
    for name, epochs in (("100 epochs", 100), ("300 epochs", 300)):
        line(f"width 32, {name}", *(f"pass@{n}" for n in COLUMNS))
        for N in COLUMNS:
            row = runs(args, "limited" if N > 1 else "ce", N, n_embd=32, pass_over=0.01, epochs=epochs)
            line(f"trained for N = {N}", *(stack(row, n)[:, -1, 0].mean() for n in COLUMNS))


class FixedWeights(Search):
    """`search`, where the weight of a theorem is its p before training, for ever."""

    def refresh(self, model, epoch):
        if epoch == 0:
            p = super().log_p(model, range(self.size)).exp().detach()
            self.weights = p / p.mean()

    def log_p(self, model, batch):
        log_p = super().log_p(model, batch)
        return self.weights[batch] * log_p if torch.is_grad_enabled() else log_p


def solution_11(args):
    TASKS["fixed-weights"] = FixedWeights
    rows = {"reward N=1": ("reward", 1, "search"), "fixed weights": ("ce", 1, "fixed-weights"),
            "limited N=64": ("limited", 64, "search")}
    rows = {label: runs(args, *which, with_training=True) for label, which in rows.items()}
    after = {f"reward N={N}, after imitation": runs(args, "reward", N, "search", True, start="prove")
             for N in (1, 64)}
    header()
    for label, row in (rows | after).items():
        confidence = passn.curve(row, "confidence").mean(axis=0)
        for name, i in (("before training", 0), (label, -1)) if label.startswith("reward N=1") else ((label, -1),):
            best = stack(row, 64)[..., 0].max(axis=1).mean()
            line(name, *(stack(row, n)[:, i, 0].mean() for n in (1, 64)), best if i else "", confidence[i])
    line("pass@64, hardest quarter to easiest")
    first = [p_of(run, 0) for run in rows["reward N=1"]]
    quarter = [np.argsort(np.argsort(p)) * 4 // len(p) for p in first]
    for label, row in ({"before training": rows["reward N=1"]} | rows).items():
        pass_64 = [pass_at_n(p_of(run, 0 if label == "before training" else -1), 64).numpy() for run in row]
        line(label, *(np.mean([values[q == i].mean() for values, q in zip(pass_64, quarter)]) for i in range(4)))
    line("training theorems", "pass@64", "p > 0.5", "before: @64", "p > 0.5")
    for label, row in (rows | after).items():
        p = np.array([[run["history"][i]["all_train_p"] for run in row] for i in (-1, 0)])
        line(label, *(value for each in p for value in (pass_at_n(each, 64).mean(), (each > 0.5).mean())))


class SampledSearch(Search):
    """`search`, but the gradient of pass@N is estimated from attempts, as in reinforcement learning (REINFORCE)."""
    settings = Search.settings | {"num_tries": 64}  # attempts at each theorem of a batch, N or more
    advantages = staticmethod(answers.advantages)

    def __init__(self, seed=0, N=64, **config):
        super().__init__(seed, **config)
        self.N, self.num_tries = N, self.own(config).num_tries

    def sample_tries(self, model, batch):
        """Attempts at training theorems, all at once, one depth after the other: which succeed, and their
        log-probabilities, differentiable, both (B, num_tries)."""
        table = join(self.train[i] for i in batch)
        log_pi = log_policy(model, table)
        rows = table.theorems.repeat_interleave(self.num_tries)
        tries = torch.arange(len(rows))  # the attempt that each open state belongs to
        has_failed, log_p = torch.zeros(len(rows), dtype=torch.bool), log_pi.new_zeros(len(rows))
        for _ in range(MAX_DEPTH):
            tactics = choose(log_pi[rows].exp())
            log_p = log_p.index_add(0, tries, log_pi[rows, tactics])
            subgoals = table.subgoals[rows, tactics]
            above, side = (subgoals != PROVED).nonzero(as_tuple=True)
            rows, tries = subgoals[above, side], tries[above]
            is_dead = rows == DEAD_END
            has_failed[tries[is_dead]] = True
            rows, tries = rows[~is_dead], tries[~is_dead]
        has_failed[tries] = True  # still open where no tactics are left
        return ~has_failed.view(-1, self.num_tries), log_p.view(-1, self.num_tries)

    def log_p(self, model, batch):
        """For training, what has the estimate of pass@N's gradient: it is no log p. In measurements, log p, exactly."""
        if not torch.is_grad_enabled():
            return super().log_p(model, batch)
        is_right, log_p = self.sample_tries(model, batch)
        return (self.advantages(is_right.double(), self.N) * log_p).sum(dim=1)


def solution_12(args):
    name = "my-sampled-search" if "advantages" in args.mine else "sampled-search"
    TASKS[name], LOSSES["sampled"] = SampledSearch, LOSSES["ce"]
    SampledSearch.advantages = staticmethod(args.write["advantages"])
    header()
    for N in (1, 64):
        show(args, "reward", N, "search")
        show(args, "sampled", N, name)


def solution_13(args):
    grpo_loss = args.write["grpo_loss"]
    args.write["grpo_loss"] = lambda log_p, N: grpo_loss(log_p)
    for task in ("multiply", "search", *(["math"] if args.math_dir else [])):
        header(f"{task}, power 0 to 1")
        quarter, three_quarters = (enter(args, "power_loss", power) for power in (0.25, 0.75))
        for loss in ("limited", quarter, "root", three_quarters, "reward"):
            show(args, loss, 64, task, **({"pass_over": 0.0} if loss in ("limited", "root") else {}))
    header("search, after imitation")
    for loss, N in (("reward", 1), (enter(args, "grpo_loss"), 1), (enter(args, "maxrl_loss"), 64), ("reward", 64)):
        show(args, loss, N, "search", start="prove")


def solution_14(args):
    task = TASKS["math"](math_dir=args.math_dir)
    counts = Counter(answer for _, answer in task.problems["train"])
    f = np.array([*counts.values(), 0])
    place = {answer: i for i, answer in enumerate(counts)}
    right = [place.get(answer, -1) for _, answer in task.problems["test"]]
    policy = args.write["optimal_policy"](torch.tensor(f[:-1] / f.sum(), dtype=torch.float64), 64)
    rows = {"best of the blind": [np.append(policy, 0)[right]], "blind by frequency": [(f / f.sum())[right]]}
    for row in sum((passn.load_runs(args.out, name, args.seeds) for name in ("math", "math-lm")), []):
        name = "" if row[0]["task"] == "math" else "pretrained: "
        if row[0]["loss"] == "ce":
            best = [p_of(run, pass_at(run, 64)[:, 0].argmax()) for run in row]
            rows[f"{name}cross-entropy, best epoch"] = best
        rows[f"{name}{row[0]['label']}, end"] = [p_of(run) for run in row]
    count = f[right]
    groups = {"all": count >= 0, "to 5 times": count <= 5, "6 to 30": (count > 5) & (count <= 30), "more": count > 30}
    line("pass@64; answers seen in training", *groups)
    pass_64 = {label: pass_at_n(np.array(p), 64).mean(dim=0).numpy() for label, p in rows.items()}
    for label, values in pass_64.items():
        line(label, *(values[group].mean() for group in groups.values() if group.any()))
        best = pass_64.get(("pretrained: " if "pretrained" in label else "") + "cross-entropy, best epoch", values)
        if label.endswith("end"):
            lead = values - best
            line("  minus cross-entropy's best", *("{:+.3f}±{:.3f}".format(*over_seeds(lead[group]))
                                                   for group in groups.values() if group.any()))


SOLUTIONS = {name[9:]: function for name, function in [*globals().items()] if name.startswith("solution_")}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Run the experiment of an exercise.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("exercise", choices=SOLUTIONS, help="its number")
    parser.add_argument("--mine", default="", help="your file, whose functions take the place of those in answers.py")
    parser.add_argument("--seeds", type=int, default=1, help="train with that many seeds, from 10 on")
    parser.add_argument("--out", default="out", help="the folder of the runs")
    parser.add_argument("--math-dir", default="", help="the folder of the MATH dataset, for exercises 13 and 14")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        args.mine = runpy.run_path(args.mine) if args.mine else {}
        args.write = vars(answers) | args.mine
        args.seeds = range(10, 10 + args.seeds)
        SOLUTIONS[args.exercise](args)
    except KeyboardInterrupt:
        print("\nsolutions.py: interrupted; the runs that were finished are kept", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError) as error:
        fail(error)


if __name__ == "__main__":
    main()
