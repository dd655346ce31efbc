"""The experiments of the exercises, one function each. In the folder of passn.py:

    python exercises/solutions.py 8
    python exercises/solutions.py 8 --mine my_file.py --seeds 3

With --mine, functions that you wrote take the place of those in answers.py. Runs are read from the folder --out, and
new ones are saved there: a run that is there is not trained again, but with a function of yours it is."""

import argparse
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of passn.py

import answers
import passn
from passn import COLUMNS, LOSSES, at_best, curve, estimate_pass_at_n, fail, over_seeds, pass_at, pass_at_n, stack
from toy_tasks import TASKS, Multiply, Search

COLORS = "#D55E00", "#56B4E9", "#0072B2", "black"  # for the colour-blind
HEADER = "pass@1", "pass@64", "best@64", "confidence"
measure_all = passn.evaluate


def line(label, *cells):
    """Print a line of a table: texts as they are, numbers with three digits, pairs as mean ± standard error."""
    formats = {str: "{}", tuple: "{0[0]:+.3f}±{0[1]:.3f}"}
    print(f"{label:34}", *(f"{formats.get(type(cell), '{:.3f}').format(cell):>12}" for cell in cells))


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
        if is_same and not loss.startswith("my-") and (not with_training or "all_train_p" in run["history"][0]):
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


def show(args, *which, label="", epoch=-1, **changes):
    """A line of a table, means over the seeds: pass@1, pass@64 and confidence in an epoch, pass@64 in the best one."""
    row = runs(args, *which, **changes)
    pass_1, pass_64 = (stack(row, N)[:, epoch, 0] for N in (1, 64))
    values = pass_1, pass_64, at_best(row, 64)[0], curve(row, "confidence")[:, epoch]
    line(label or row[0]["label"], *map(np.mean, values))
    return row


def solution_1(args):
    row = runs(args, "ce")
    line("cross-entropy", "pass@1", "pass@64", "confidence")
    for i, record in enumerate(row[0]["history"]):
        values = *(stack(row, N)[:, i, 0] for N in (1, 64)), curve(row, "confidence")[:, i]
        line(f"epoch {record['epoch']}", *map(np.mean, values))
    line("", "best epoch", "and T", "the end", "and T")
    for row in (row, runs(args, "limited")):
        end = stack(row, 64)[:, -1]
        line(row[0]["label"], *map(np.mean, (*at_best(row, 64), end[:, 0], end.max(axis=1))))


def solution_2(args):
    p = torch.tensor(p_of(runs(args, "limited")[0]), dtype=torch.float64)
    line("", "pass@64", "deviation")
    line("exact", pass_at_n(p, 64).mean())
    torch.manual_seed(0)
    for n in (64, 128, 512):
        num_right = torch.distributions.Binomial(n, p).sample([200])  # 200 times n samples of each problem
        estimates = {"unbiased": estimate_pass_at_n(n, num_right, 64), "c/n for p": pass_at_n(num_right / n, 64)}
        for label, values in estimates.items():
            line(f"{n} samples, {label}", values.mean(), values.mean(dim=1).std())


def solution_6(args):
    line("", *HEADER)
    for changes in ({}, {"epochs": 2 * passn.configure("multiply", "ce")["epochs"]}):
        for loss in ("ce", "limited", "root"):
            show(args, loss, **changes)
    all_limited, all_root = (show(args, loss, pass_over=0.0) for loss in ("limited", "root"))
    limited, root = (runs(args, loss) for loss in ("limited", "root"))
    line("at the end, paired", "pass@1", "pass@8", "pass@64")
    for label, row, other in (("root minus limited", root, limited),
                              ("limited, passing over minus not", limited, all_limited),
                              ("root, passing over minus not", root, all_root)):
        line(label, *(over_seeds((stack(row, n) - stack(other, n))[:, -1, 0]) for n in COLUMNS[:3]))


def solution_7(args):
    line("cross-entropy's best epoch, @64", "training", "test", "limited, end")
    for task in ("multiply", "finetune", "prove"):
        row = runs(args, "ce", task=task, with_training=True)
        best = stack(row, 64)[..., 0].argmax(axis=1)
        in_training = [pass_at_n(run["history"][i]["all_train_p"], 64).mean() for run, i in zip(row, best)]
        limited = stack(runs(args, "limited", task=task), 64)[:, -1, 0]
        line(task, *map(np.mean, (in_training, at_best(row, 64)[0], limited)))


def solution_8(args):
    line("", *HEADER)
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
    line("", *HEADER)
    show(args, "ce")
    show(args, "ce", task="averaged", label="cross-entropy, weights averaged")
    for changes in ({"weight_decay": 0.1}, {"weight_decay": 0.3}, {"n_embd": 32}):
        show(args, "ce", **changes)
    show(args, "limited")
    show(args, "limited", n_embd=32)


def solution_10(args):
    figure = Figure(figsize=(9, 4), layout="constrained")
    ns = 2 ** np.arange(10)
    usual = passn.configure("multiply", "ce")["epochs"]
    for axis, epochs in zip(figure.subplots(1, 2), (usual, 3 * usual)):
        line(f"width 32, {epochs} epochs", *(f"pass@{n}" for n in COLUMNS))
        rows = [runs(args, "limited" if N > 1 else "ce", N, n_embd=32, pass_over=0.01, epochs=epochs) for N in COLUMNS]
        pass_n = np.array([[stack(row, n)[:, -1, 0].mean() for n in ns] for row in rows])
        for N, values, share, color in zip(COLUMNS, pass_n, pass_n / pass_n.max(axis=0), COLORS):
            line(f"trained for N = {N}", *values[::3])
            axis.plot(ns, share, color=color, marker="o", markevery=[int(np.log2(N))], label=f"N = {N}")
        axis.set(title=f"after {epochs} epochs: pass@n / the best", xlabel="tries n (dot: trained for n)")
        axis.set(xscale="log", xticks=COLUMNS, xticklabels=COLUMNS, ylim=(0, 1.03))
    figure.axes[0].legend(title="trained for", loc="lower right")
    passn.save_figure(figure, passn.folder(args.out) / "frontier.png")


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
    line("", *HEADER)
    show(args, "reward", 1, "search", True, epoch=0, label="before training")
    rows = {"reward N=1": show(args, "reward", 1, "search", True),
            "fixed weights": show(args, "ce", 1, "fixed-weights", True, label="fixed weights"),
            "limited N=64": show(args, "limited", 64, "search", True)}
    show(args, "reward", 1, "search", True, epoch=0, label="after imitation", start="prove")
    after = [show(args, "reward", N, "search", True, start="prove") for N in (1, 64)]
    line("pass@64 by p before, quarters", "hardest", "", "", "easiest")
    before = np.array([p_of(run, 0) for run in rows["reward N=1"]])
    quarter = before.argsort(axis=1).argsort(axis=1) * 4 // before.shape[1]
    end = {label: [*map(p_of, row)] for label, row in rows.items()}
    for label, p in ({"before training": before} | end).items():
        line(label, *(pass_at_n(p, 64)[quarter == i].mean() for i in range(4)))
    line("training theorems", "@64 before", "at the end", "p > 0.5", "at the end")
    for label, row in zip([*rows, "after imitation, N=1", "after imitation, N=64"], [*rows.values(), *after]):
        p = np.array([[run["history"][i]["all_train_p"] for run in row] for i in (0, -1)])
        line(label, *pass_at_n(p, 64).mean(dim=(1, 2)), *(p > 0.5).mean(axis=(1, 2)))


def solution_13(args):
    for task in ("multiply", "search", *(["math"] if args.math_dir else [])):
        line(f"{task}, power 0 to 1", *HEADER)
        quarter, three_quarters = (enter(args, "power_loss", power) for power in (0.25, 0.75))
        for loss in ("limited", quarter, "root", three_quarters, "reward"):
            show(args, loss, 64, task, **({"pass_over": 0.0} if loss in ("limited", "root") else {}))
    line("search, after imitation", *HEADER)
    for loss, N in (("reward", 1), (enter(args, "grpo_loss"), 1), (enter(args, "maxrl_loss"), 64), ("reward", 64)):
        show(args, loss, N, "search", start="prove")


def solution_14(args):
    task = TASKS["math"](math_dir=args.math_dir)
    train, test = ([answer for _, answer in problems] for problems in task.problems.values())
    counts = Counter(train)
    f = torch.tensor([*counts.values()], dtype=torch.float64) / len(train)
    best = dict(zip(counts, args.write["optimal_policy"](f, 64).tolist()))
    p = {"best of the blind": [[best.get(answer, 0.0) for answer in test]]}
    for row in sum((passn.load_runs(args.out, name, args.seeds) for name in ("math", "math-lm")), []):
        label = row[0]["task"].removeprefix("math-") + " " + row[0]["label"]
        if row[0]["loss"] == "ce":
            p[f"{label}, best epoch"] = [p_of(run, pass_at(run, 64)[:, 0].argmax()) for run in row]
        p[label] = [*map(p_of, row)]
    seen = np.array([counts[answer] for answer in test])
    groups = seen >= 0, seen <= 5, (seen > 5) & (seen <= 30), seen > 30
    line("pass@64; answers seen", "all", "to 5 times", "6 to 30", "from 31")
    pass_64 = {label: pass_at_n(values, 64).mean(dim=0).numpy() for label, values in p.items()}
    for label, values in pass_64.items():
        line(label, *(values[group].mean() for group in groups))
        of_best = pass_64.get(f"{label.split()[0]} cross-entropy, best epoch")
        if of_best is not None and "cross-entropy" not in label:
            line("minus cross-entropy's best epoch", *(over_seeds((values - of_best)[group]) for group in groups))


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
        passn.require(args.seeds > 0, "--seeds is from 1 on")
        sys.path.insert(0, str(Path(args.mine).parent))  # where your file may import from
        args.mine = runpy.run_path(args.mine) if args.mine else {}
        args.write = vars(answers) | args.mine
        args.seeds = range(10, 10 + args.seeds)
        SOLUTIONS[args.exercise](args)
    except KeyboardInterrupt:
        print("\nsolutions.py: interrupted; the runs that were finished are kept", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not args.mine and not isinstance(error, (OSError, ValueError, FloatingPointError)):
            raise  # a fault of this program
        fail(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
