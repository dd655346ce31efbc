"""Fine-tune a pretrained language model on MATH's questions, with the losses of passn.py:

    python exercises/language_model.py MODEL --math-dir DIR [flags of passn.py]

MODEL is a name on the Hugging Face hub, a folder or a .gguf file. Trained are its top --n-layer layers, not the head, on the
answer's tokens alone: the model as it came reads each question once. A process takes 4 GB for 135 million parameters.

This is the example to follow for adding a kind of answers (here `LanguageModel`) and a task (`math_lm`) to passn.py
from outside. They enter its registries at the end of the file: worker processes import it too.
"""

import copy
import sys
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import pad
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # the folder of passn.py
import passn
from toy_tasks import TASKS, Task, answers_to_guess, digest, mask_after_end, math_problems

NO_TOKEN = -100  # padding: a pretrained model's token 0 may be a word


class LanguageModel(passn.Answers):
    """Answers in a pretrained model's own tokens. Problems are numbered, the training problems first."""

    def __init__(self, task, settings, seed, device):
        super().__init__(task, settings, seed, device)
        self.original, self.tokenizer = load(settings["model"])
        self.original.to(device)
        self.train_subset = torch.arange(self.task.size)[::self.task.size // 200 + 1]
        self.prompts, self.answers = map(torch.cat, zip(task.train, task.test))
        self.A = self.answers.shape[1]
        texts = torch.cat([self.prompts, self.answers[:, :-1].clamp(min=0)], dim=1)
        self.texts = [tuple(text[text != NO_TOKEN].tolist()) for text in texts]

    def encoded(self, problems, num_layers):
        """What `encode` returns for some problems, as two lists."""
        return zip(*(encode(self.original, self.device, num_layers, self.texts[i], self.A) for i in problems))

    def new_epoch(self, model, epoch, N):
        if epoch == 0:
            bar = tqdm(range(len(self.texts)), "reading the questions", leave=False, delay=1)
            self.encoded(bar, self.settings["n_layer"])

    def new_model(self):
        """The top layers, and the frozen head, fed with stored states. Raises ValueError where the logits are not the same."""
        model = copy.deepcopy(self.original)
        model.model.layers = model.model.layers[-self.settings["n_layer"]:].requires_grad_(True)
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = i
        with torch.no_grad():
            logits, _ = self.right_answers(model, [0])
            whole = self.original(torch.tensor(self.texts[:1], device=self.device)).logits[:, -self.A:]
        error = (logits - whole).std() / whole.std()
        if not error < 0.05:  # rounding to bfloat16 makes 0.01
            raise ValueError(f"the model's top layers on their own give other logits than the whole, by {error:.0%}: "
                             "choose a model like Llama")
        return model

    def log_p(self, model, batch):
        return passn.answer_log_p(*self.right_answers(model, batch), ignore_index=NO_TOKEN)

    def measure(self, model, split, temperatures):
        """As in `Answers`, but with the confidence of every fifth problem only, since it takes longer."""
        problems = self.train_subset if split == "train" else torch.arange(self.task.size, len(self.texts))

        def p_of(answers_to, problems):  # (number of temperatures, P)
            parts = []
            for batch in problems.split(50):
                logits, answers = answers_to(model, batch)
                parts.append(torch.stack([passn.answer_log_p(logits, answers, T, NO_TOKEN) for T in temperatures]))
            return torch.cat(parts, dim=1).cpu().double().exp()

        both = zip(p_of(self.right_answers, problems), p_of(self.own_answers, problems[::5]))
        return {T: (p, confidence, None) for T, (p, confidence) in zip(temperatures, both)}

    def right_answers(self, model, problems):
        """The logits (B, A, vocab_size) that predict the right answers to B problems, and these answers (B, A)."""
        states, past = self.encoded(problems, self.settings["n_layer"])
        run = continuation(model, past)
        return run(self.A, inputs_embeds=torch.stack(states).float()).logits, self.answers[problems]

    def own_answers(self, model, problems, temperature=1e-6):
        """The same for answers that are sampled token by token. So near temperature 0, they are the greedy ones."""
        num_top = len(model.model.layers)
        _, past = self.encoded(problems, num_layers=0)
        run_lower = continuation(self.original.model, past)
        run_top = continuation(model, [keys_values[-num_top:] for keys_values in past])
        tokens, logits = self.prompts[problems, -1:], []
        for _ in range(self.A):
            out = run_lower(1, input_ids=tokens[:, -1:], output_hidden_states=True)
            out = run_top(1, inputs_embeds=out.hidden_states[-1 - num_top])
            logits.append(out.logits)
            p = (out.logits[:, 0] / temperature).softmax(dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=self.generator)], dim=1)
        return torch.cat(logits, dim=1), mask_after_end(tokens[:, 1:], self.tokenizer.eos_token_id, NO_TOKEN)

    def show_tries(self, model, num_tries):
        first = range(self.task.size, len(self.texts))[:3]
        tries = [self.own_answers(model, [i] * num_tries, temperature=1.0)[1] for i in first]
        return self.task.as_text(torch.stack(tries))


@cache
def load(name):
    """A causal language model, frozen, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path, file, unpack = Path(name), {}, {}
    if path.suffix == ".gguf":
        name, file = path.parent, {"gguf_file": path.name}
        unpack = {"quantization_config": {"quant_method": "gguf", "dequantize": True}}  # else it cannot be trained
    tokenizer = AutoTokenizer.from_pretrained(name, **file)
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no end token")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **file, **unpack)
    return model.requires_grad_(False), tokenizer


@cache  # the same for every loss and seed
@torch.no_grad()
def encode(model, device, num_layers, text, A):
    """What the model's top layers (0: all layers) need to know of a text, a tuple of tokens: the states below them at
    the last A tokens, (A, C), and their keys and values at the T before, (layers, 2, heads, T, ·), in bfloat16."""
    from transformers import DynamicCache
    tokens, past = torch.tensor([text], device=device), DynamicCache()
    out = model.model(tokens, past_key_values=past, output_hidden_states=True)
    layers = past.layers[-num_layers:]
    states = out.hidden_states[-1 - len(layers)][0, -A:]
    keys_values = [torch.cat([layer.keys, layer.values])[:, :, :-A] for layer in layers]
    return states.bfloat16(), torch.stack(keys_values).bfloat16()


def continuation(model, past):
    """A function that runs a model at the next A tokens of B texts, again and again, given their keys and values."""
    from transformers import DynamicCache
    lengths = torch.tensor([[keys_values.shape[-2]] for keys_values in past], device=model.device)  # (B, 1)
    T = lengths.max().item()
    padded = [pad(keys_values, (0, 0, T - keys_values.shape[-2], 0)) for keys_values in past]  # in front
    known = DynamicCache(torch.stack(padded, dim=2).float())
    def run(A, **inputs):
        places = torch.arange(-T, known.get_seq_length() - T + A, device=model.device)  # 0: the first new token
        mask, positions = places >= -lengths, lengths + places[-A:]
        return model(**inputs, past_key_values=known, position_ids=positions, attention_mask=mask)
    return run


def math_lm(seed=0, math_dir="", model=""):
    """The problems of `math` in a model's tokens. `seed` changes nothing here."""
    problems = {split: math_problems(math_dir, split) for split in ("train", "test")}
    questions, answers = zip(*problems["train"], *problems["test"])
    try:
        original, tokenizer = load(model)
        prompts = in_tokens(tokenizer, [f"{question}\nAnswer:" for question in questions], "left")
        answers = in_tokens(tokenizer, [f" {answer}{tokenizer.eos_token}" for answer in answers], "right")
        sizes = [*map(len, problems.values())]
        train, test = zip(prompts.split(sizes), answers.split(sizes))
        vocab = tokenizer.batch_decode(torch.arange(original.config.vocab_size)[:, None], skip_special_tokens=True)
        vocab = [text.replace("\n", " ") for text in vocab]
        [layer.self_attn.layer_idx for layer in original.model.layers]  # an error where it is not built like Llama
        weights = [weight.view(torch.int32).sum().item() for weight in original.parameters()]
        data = f"{Path(model).resolve().name}-{digest([problems, weights, str(original.config)])}"
        return Task("math-lm", "language model", sizes[0], vocab, 0, train, test, **answers_to_guess(problems), data=data)
    except Exception as error:  # no package, no such name, no network, another architecture: errors of many kinds
        reason = str(error).strip().split("\n")[0]
        needs = "pip install transformers accelerate gguf; a model like Llama, by its hub name, folder or .gguf file"
        raise ValueError(f"{model}: {type(error).__name__}: {reason} (needed: {needs})") from None


def in_tokens(tokenizer, texts, side):
    """Tokens (number of texts, longest), padded on one side."""
    batch = tokenizer(texts, padding=True, padding_side=side, add_special_tokens=side == "left", return_tensors="pt")
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, NO_TOKEN)


TASKS["math-lm"] = math_lm
passn.KINDS["language model"] = LanguageModel
passn.SETTINGS["math-lm"] = passn.DEFAULTS | {
    "epochs": 8, "evaluations": 4, "batch_size": 32, "learning_rate": 2e-4, "pass_over": 0.0, "n_layer": 10,
    "math_dir": "", "model": ""}

if __name__ == "__main__":
    if len(sys.argv) == 1 or sys.argv[1].startswith("-"):
        passn.fail("usage: python exercises/language_model.py MODEL --math-dir DIR [flags of passn.py]")
    sys.exit(passn.main(["--task", "math-lm", "--model", *sys.argv[1:]]))
