"""Which language is this word? A small residual 1-D CNN on characters, with EMAX1d, SE and neither.

    pip install 'emax-timm[downstream]'
    python examples/text.py [--words Schmetterling papillon] [--seeds 3]

The words are the names of territories and languages in 30 languages, from the package Babel (data
of the Unicode CLDR, under the Unicode licence). The names of a batch differ in length, so all but
the longest are padded, and a mask says where characters are: a word has the same logits alone and
in any batch. Names that are written alike in two of the languages are left out.

A fifth of the territories and of the languages is for the test, in every language at once: no
network is tested on a country whose name in a related language it has seen. Stems can be shared
("Polen" may be for training and "Polnisch" for the test).

The networks differ in nothing but the attention: the same epochs, order of the names, first weights
of the other layers, and learning rate (that of segmentation.py, chosen before any run). Intervals
are Student's t at 95 % over seeds, for one split of the names.
"""

import argparse
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from emax_timm import create_attention, set_grouping
from emax_timm.compare.statistics import paired

try:
    from babel import Locale
except ImportError as error:
    print(f"text.py: {error}: pip install 'emax-timm[downstream]'", file=sys.stderr)
    raise SystemExit(2) from None

LANGUAGES = (
    *("ca", "cs", "de", "en", "es", "et", "fi", "fr", "hr", "hu", "it", "nl"),  # Latin script
    *("pl", "pt", "ro", "sk", "sv", "tr"),
    *("bg", "ru", "sr", "uk", "ar", "fa", "ur", "hi", "mr", "ne", "el", "ja"),  # other scripts
)
LONGEST = 24  # one name in forty is longer, and left out: a phrase rather than a word
PADDING, UNKNOWN = 0, 1
BUTTERFLIES = ("Schmetterling", "papillon", "motýl", "kelebek", "бабочка", "метелик", "πεταλούδα")


class Names(NamedTuple):
    """Names in lower case, and the place in `LANGUAGES` of what each is in, [n]."""

    texts: list[str]
    labels: Tensor


def normalise(text: str) -> str:
    """Write a name as the networks see it: composed characters, in lower case."""
    return unicodedata.normalize("NFC", text).lower()


def load_names(limit: int | None = None) -> list[Names]:
    """Load the names for training and those for the test, all or about so many of each."""
    places: dict[str, set[tuple[int, bool]]] = defaultdict(set)
    for label, language in enumerate(LANGUAGES):
        locale = Locale.parse(language)
        for kind, names in ("territory", locale.territories), ("language", locale.languages):
            for code, name in names.items():
                # en_US goes where en goes, whatever other codes this version of Babel has.
                is_test = zlib.crc32(f"{kind} {code.split('_')[0]}".encode()) % 5 == 0
                places[normalise(name)].add((label, is_test))
    splits: tuple[dict[str, int], dict[str, int]] = {}, {}
    for text, found in sorted(places.items()):
        if len(found) == 1 and len(text) <= LONGEST:
            ((label, is_test),) = found
            splits[is_test][text] = label
    sides = []
    for split in splits:
        texts = list(split)[:: max(1, len(split) // (limit or len(split)))]
        sides.append(Names(texts, torch.tensor([split[text] for text in texts])))
    return sides


class Alphabet:
    """The characters that occur at least twice in some texts, numbered; others are unknown."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(character for text in texts for character in text)
        known = sorted(character for character, count in counts.items() if count > 1)
        self.numbers = {character: number for number, character in enumerate(known, UNKNOWN + 1)}
        self.size = len(self.numbers) + UNKNOWN + 1

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Number the characters of the texts, [n, longest text], with `PADDING` after each."""
        rows = [[self.numbers.get(character, UNKNOWN) for character in text] for text in texts]
        return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, PADDING)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average x [b, c, l] over its characters, where the mask [b, l] is true: [b, c]."""
    return x.masked_fill(~mask[:, None], 0).sum(dim=2) / mask.sum(dim=1, keepdim=True)


class SE1d(nn.Module):
    """Squeeze-and-excite for padded sequences [b, c, l]; timm's serves images alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 8  # as many as timm's SE has at 64 channels
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(masked_mean(x, mask)).relu()).sigmoid()[:, :, None]


class Convolution(nn.Module):
    """A convolution that reads zeros in the padding, and a norm of each position apart."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.conv(x.masked_fill(~mask[:, None], 0))
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    """Two convolutions and an attention in a residual branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Convolution(channels), Convolution(channels)
        self.attention: nn.Module | None = None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x, mask).relu(), mask)
        if self.attention is not None:
            y = self.attention(y, mask)
        return (x + y).relu()


ATTENTIONS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "se": SE1d,
    "emax": lambda channels: create_attention("emax", channels, dims=1, factor=8),
}


class TextNet(nn.Module):
    """Embedded characters, residual blocks, the mean over the characters, a linear classifier."""

    def __init__(self, characters: int, attention: str, channels: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, channels, padding_idx=PADDING)
        self.blocks = nn.ModuleList([Block(channels) for _ in range(depth)])
        self.head = nn.Linear(channels, len(LANGUAGES))
        build = ATTENTIONS[attention]
        if build is not None:  # last, so that a seed gives the other layers the same weights
            for block in self.blocks:
                block.attention = build(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits [b, languages] of numbered characters [b, l]."""
        mask = tokens != PADDING
        x = self.embedding(tokens).transpose(1, 2)  # [b, c, l]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(masked_mean(x, mask))


def make_batches(texts: Sequence[str], epochs: int, seed: int, size: int = 128) -> list[Tensor]:
    """Draw batches of indices: in each epoch every text once, among texts of similar length."""
    random, lengths = torch.Generator().manual_seed(seed), torch.tensor([len(t) for t in texts])
    batches = []
    for _ in range(epochs):
        order = torch.randperm(len(texts), generator=random)
        for part in order.split(8 * size):
            parts = part[lengths[part].argsort(stable=True)].split(size)
            batches += [parts[k] for k in torch.randperm(len(parts), generator=random).tolist()]
    return batches


def train(model: nn.Module, names: Names, alphabet: Alphabet, epochs: int, seed: int) -> None:
    """Train a network, in an order of the names that follows from the seed."""
    batches = make_batches(names.texts, epochs, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    for step, batch in enumerate(batches):
        # The schedule of EMAX's grouping that train.py has; other layers have none.
        rise = min(1.0, max(0.0, (step / steps - 0.05) / 0.15))
        set_grouping(model, warmup=rise, temperature=1 - step / steps / 2)
        logits = model(alphabet.encode([names.texts[index] for index in batch.tolist()]))
        loss = nn.functional.cross_entropy(logits, names.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def predict(model: nn.Module, texts: Sequence[str], alphabet: Alphabet) -> Tensor:
    """Compute the probabilities [n, languages] of texts."""
    model.eval()
    parts = [texts[start : start + 500] for start in range(0, len(texts), 500)]
    return torch.cat([model(alphabet.encode(part)).softmax(dim=1) for part in parts])


def naive_bayes(train: Names, texts: Sequence[str], parts: Callable[[str], list[str]]) -> Tensor:
    """Choose languages [n] by independent parts of the texts, with add-one smoothing."""
    counts: dict[str, Tensor] = defaultdict(lambda: torch.ones(len(LANGUAGES)))
    for text, label in zip(train.texts, train.labels.tolist(), strict=True):
        for part in parts(text):
            counts[part][label] += 1
    total = torch.stack(list(counts.values())).sum(dim=0).log()
    prior = train.labels.bincount(minlength=len(LANGUAGES)).log()
    scores = {part: count.log() - total for part, count in counts.items()}
    known = ([scores[part] for part in parts(text) if part in scores] for text in texts)
    return torch.stack([sum(found, prior) for found in known]).argmax(dim=1)


BASELINES: dict[str, Callable[[str], list[str]]] = {
    "script": lambda text: [unicodedata.name(c).split()[0] for c in text if c.isalpha()][:1],
    "letters": list,
    "trigrams": lambda text: [f" {text} "[start : start + 3] for start in range(len(text))],
}
"""What naive Bayes looks at: the script of the first letter, the letters, or three in a row."""


def interval(first: Sequence[float], second: Sequence[float] | None = None, sign: str = "") -> str:
    """Write the mean of values over seeds, or of paired differences, and half its interval."""
    difference = paired(first, second or [0.0] * len(first))
    half = "       " if difference.half_width is None else f"± {difference.half_width:.3f}"
    return f"{difference.mean:{sign}6.3f} {half}"


def confusions(labels: Tensor, predicted: Tensor) -> str:
    """Name the five most frequent errors, each with its share of the language's names."""
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True)).most_common()
    errors = [(true, other, count) for (true, other), count in pairs if true != other][:5]
    totals = labels.bincount().tolist()
    return ", ".join(f"{LANGUAGES[a]} as {LANGUAGES[b]} {n / totals[a]:.0%}" for a, b, n in errors)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which language is this word?")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--limit", type=int, help="use about this many names of each split")
    parser.add_argument("--words", nargs="+", default=BUTTERFLIES, help="to name the language of")
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    if not all(arguments.words):
        parser.error("--words must have characters, and one has none")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    names, test = load_names(arguments.limit)
    alphabet = Alphabet(names.texts)
    print(f"{len(LANGUAGES)} languages, {len(names.texts)} names to train on, ", end="")
    print(f"{len(test.texts)} to test on, {alphabet.size} characters")
    print("          accuracy         minus none       parameters  seconds a seed")
    for name, parts in BASELINES.items():
        hits = naive_bayes(names, test.texts, parts) == test.labels
        print(f"{name:8}  {hits.double().mean():6.3f}", flush=True)

    models: list[nn.Module] = []
    predictions: list[Tensor] = []
    accuracies: dict[str, list[float]] = {name: [] for name in ATTENTIONS}
    for name, values in accuracies.items():
        start = time.perf_counter()
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            models.append(TextNet(alphabet.size, name))
            train(models[-1], names, alphabet, arguments.epochs, seed)
            predictions.append(predict(models[-1], test.texts, alphabet).argmax(dim=1))
            values.append((predictions[-1] == test.labels).double().mean().item())
        seconds = (time.perf_counter() - start) / arguments.seeds
        size = sum(parameter.numel() for parameter in models[-1].parameters())
        gain = "" if name == "none" else interval(values, accuracies["none"], "+")
        print(f"{name:8}  {interval(values)}  {gain:15}  {size:10,}  {seconds:14.1f}", flush=True)

    last = torch.cat(predictions[-arguments.seeds :])
    print(f"most frequent errors of emax: {confusions(test.labels.repeat(arguments.seeds), last)}")
    shown = predict(models[-1], [normalise(word) for word in arguments.words], alphabet).topk(3)
    english = [Locale.parse(language).english_name for language in LANGUAGES]
    for word, values, labels in zip(arguments.words, *(x.tolist() for x in shown), strict=True):
        best = (f"{english[k]} {value:.3f}" for k, value in zip(labels, values, strict=True))
        print(f"{word}: {', '.join(best)}")


if __name__ == "__main__":
    main()
