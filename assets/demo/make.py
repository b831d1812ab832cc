#!/usr/bin/env python3
"""Makes the demo asset: a small Qwen2 model trained on generated stories, its tokenizer and a held-out corpus.

    python assets/demo/make.py                 # everything, about eight minutes on a free core
    python assets/demo/make.py --show 5        # print five stories and stop

Steps, one section each: grammar -> stories -> tokenizer -> training -> evaluation -> files.
The same seed, versions, CPU kind and one thread give the same files.  A later step that wants the model's text or
weights (to train SAEs, say) can import this file and call `story_splits`, `load_tokenizer` and `load_model`.
"""
import argparse, json, math, os, platform, random, time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20240611
TRAIN_STORIES, HELD_OUT_STORIES = 12000, 320
VOCAB = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=10000.0)
TRAIN = dict(steps=2000, batch=16, lr=3e-3, warmup=100, weight_decay=0.05, beta2=0.98, clip=1.0)

# --- grammar -------------------------------------------------------------------------------------------------------
# A story has a hero (whose name fixes the pronoun), a friend, a topic that supplies the places, things and events,
# a weather that decides the clothes, and facts (a colour, a count) that later sentences must repeat correctly.

GIRLS = "Anna Mia Lily Rosa Clara Emma Nora Ruth Alice Ella Hannah Sofia Grace Lucy Jane Vera Ines Maya Olga Zoe".split()
BOYS = "Tom Ben Sam Leo Max Jack Peter Oscar Noah Felix Hugo Adam Paul Ivan Karl Theo Omar Luke Finn David".split()
COLOURS = "red blue green yellow white black brown purple orange grey pink silver".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ANIMALS = {  # animal: (sound, food, young)
    "dog": ("barked", "bones", "puppy"), "cat": ("purred", "fish", "kitten"), "cow": ("mooed", "grass", "calf"),
    "duck": ("quacked", "bread", "duckling"), "horse": ("neighed", "hay", "foal"), "sheep": ("bleated", "grass", "lamb"),
    "lion": ("roared", "meat", "cub"), "owl": ("hooted", "mice", "chick"), "frog": ("croaked", "flies", "tadpole"),
    "wolf": ("howled", "meat", "pup"), "hen": ("clucked", "corn", "chick"), "bee": ("buzzed", "honey", "larva"),
    "mouse": ("squeaked", "cheese", "pup"), "snake": ("hissed", "eggs", "hatchling")}
WEATHER = {  # weather: (sentence, clothing, effect)
    "rain": ("It was raining hard", "a raincoat", "The streets were wet and full of puddles"),
    "snow": ("Snow fell all night", "warm gloves", "The fields were white and the pond was frozen"),
    "sun": ("The sun was hot and bright", "a straw hat", "There was not a cloud in the sky"),
    "wind": ("A strong wind was blowing", "a thick scarf", "Leaves flew across the road"),
    "fog": ("A grey fog lay over the valley", "a heavy coat", "Nobody could see the end of the street"),
    "storm": ("Thunder rolled and lightning flashed", "tall boots", "The lights in the house went out")}
TOPICS = {  # topic: (places, things that are counted, a single object, events by {S}=He/She, jobs)
    "farm": (["the farm", "the barn", "the wheat field"], ["eggs", "pumpkins", "hens", "sacks of corn"], ["tractor", "bucket", "gate"],
             ["{S} fed the animals before breakfast.", "{S} drove the tractor along the fence.", "{S} carried milk to the kitchen."], "farmer"),
    "sea": (["the harbour", "the beach", "the island"], ["shells", "fish", "boats", "crabs"], ["boat", "sail", "anchor"],
            ["{S} pulled the net out of the water.", "{S} watched the waves break on the rocks.", "{S} steered toward the lighthouse."], "sailor"),
    "school": (["the school", "the library", "the classroom"], ["books", "pencils", "maps", "questions"], ["notebook", "bag", "ruler"],
               ["{S} wrote a long answer on the board.", "{S} read a story about a dragon.", "{S} solved the hardest problem in the class."], "teacher"),
    "kitchen": (["the bakery", "the kitchen", "the market"], ["apples", "cakes", "loaves of bread", "lemons"], ["bowl", "oven", "apron"],
                ["{S} mixed flour, butter and sugar.", "{S} tasted the soup and added salt.", "{S} put the bread into the hot oven."], "baker"),
    "forest": (["the forest", "the hill", "the river"], ["mushrooms", "berries", "acorns", "feathers"], ["tent", "lantern", "rope"],
               ["{S} followed a narrow path between the trees.", "{S} built a small fire and sat beside it.", "{S} crossed the stream on an old log."], "hunter"),
    "music": (["the theatre", "the concert hall", "the town square"], ["songs", "tickets", "drums", "dancers"], ["violin", "piano", "guitar"],
              ["{S} played a slow and gentle tune.", "{S} sang until the crowd began to clap.", "{S} practised the same song again and again."], "singer"),
    "train": (["the station", "the bridge", "the city"], ["suitcases", "tickets", "letters", "coins"], ["suitcase", "clock", "engine"],
              ["{S} looked out of the window at the mountains.", "{S} ran along the platform to catch the train.", "{S} showed the ticket to the guard."], "driver"),
    "space": (["the moon base", "the old observatory", "the launch tower"], ["stars", "planets", "rockets", "satellites"], ["telescope", "helmet", "rocket"],
              ["{S} counted backward and pressed the button.", "{S} floated slowly past the window.", "{S} drew a map of the night sky."], "pilot"),
    "garden": (["the garden", "the park", "the greenhouse"], ["roses", "tomatoes", "seeds", "butterflies"], ["spade", "ladder", "kite"],
               ["{S} dug a deep hole and planted a tree.", "{S} watered the flowers in the evening.", "{S} picked the ripest fruit."], "gardener"),
    "hospital": (["the hospital", "the clinic", "the pharmacy"], ["bandages", "bottles", "patients", "pills"], ["thermometer", "ambulance", "lamp"],
                 ["{S} listened to the old man's heart.", "{S} wrapped the broken arm with care.", "{S} told the child not to be afraid."], "doctor"),
    "football": (["the stadium", "the playing field", "the gym"], ["goals", "medals", "players", "balls"], ["whistle", "jersey", "trophy"],
                 ["{S} kicked the ball past the goalkeeper.", "{S} ran faster than anyone else on the team.", "{S} shouted for a pass near the goal."], "coach"),
    "castle": (["the castle", "the dark cave", "the village"], ["knights", "gold coins", "swords", "candles"], ["crown", "shield", "key"],
               ["{S} climbed the tower and looked for the dragon.", "{S} bowed before the king and the queen.", "{S} opened a secret door behind the throne."], "guard")}
MOODS = {"happy": ("smiled", "joy"), "sad": ("cried", "sorrow"), "angry": ("shouted", "anger"), "afraid": ("trembled", "fear"),
         "proud": ("grinned", "pride"), "tired": ("yawned", "sleep"), "curious": ("wondered", "surprise")}
ENDINGS = {"happy": ["It was the best day of the year.", "Everyone laughed and went home together."],
           "sad": ["But tomorrow would be a better day.", "A friend can make any sorrow lighter."],
           "angry": ["In the end they shook hands and forgave each other.", "After a cup of tea the anger was gone."],
           "afraid": ["Being brave means going on even when you are afraid.", "The night was long, but the morning came."],
           "proud": ["Hard work had been worth it.", "The whole town heard about it."],
           "tired": ["That night everyone slept very well.", "Soon the house was quiet and dark."],
           "curious": ["The secret was never told to anyone.", "There is always something new to learn."]}


class Person:
    def __init__(self, rng, not_name=None):
        self.girl = rng.random() < 0.5
        self.name = rng.choice([n for n in (GIRLS if self.girl else BOYS) if n != not_name])
        self.he, self.him, self.his = ("she", "her", "her") if self.girl else ("he", "him", "his")
        self.kin = rng.choice(["sister", "mother", "aunt", "grandmother"] if self.girl else ["brother", "father", "uncle", "grandfather"])


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def number(rng, n):
    """Digits one time in four, else the word."""
    return str(n) if rng.random() < 0.25 else NUMBERS[n]


def story(rng):
    """One story of 40 to 120 words."""
    hero = Person(rng)
    friend = Person(rng, hero.name)
    places, counted, objects, events, job = TOPICS[rng.choice(list(TOPICS))]
    place, second_place = rng.sample(places, 2)
    obj, colour, day = rng.choice(objects), rng.choice(COLOURS), rng.randrange(7)
    mood, weather = rng.choice(list(MOODS)), rng.choice(list(WEATHER))
    animal = rng.choice(list(ANIMALS))
    sound, food, young = ANIMALS[animal]
    S = hero.he.capitalize()

    def opening():
        return rng.choice([
            f"On {DAYS[day]} {hero.name} went to {place}.",
            f"Once there was {article(job)} named {hero.name} who lived near {place}.",
            f"{hero.name} and {hero.his} {friend.kin} {friend.name} walked to {place} on {DAYS[day]} morning.",
            f"Early in the morning {hero.name} woke up and ran to {place}.",
            f"{hero.name} was {number(rng, rng.randint(6, 12))} years old and loved {place}.",
            f"Every {DAYS[day]} {hero.name} the {job} met {friend.name} at {place}."])

    def weather_part():
        sentence, clothing, effect = WEATHER[weather]
        return rng.choice([f"{sentence}, so {hero.he} wore {clothing}.", f"{sentence}. {effect}.",
                           f"{effect}, and {hero.name} was glad to have {clothing}."])

    def counting():
        a, b = rng.randint(2, 9), rng.randint(1, 7)
        what = rng.choice(counted)
        if rng.random() < 0.5:
            return rng.choice([
                f"{S} had {NUMBERS[a]} {what}, and {friend.name} gave {hero.him} {NUMBERS[b]} more. Now {hero.he} had {NUMBERS[a + b]} {what}.",
                f"{S} counted {a} {what} in the morning and {b} in the evening. Together that made {a + b}."])
        if b >= a:
            a, b = b + 1, a
        left = f"{NUMBERS[a - b]} {what} were left" if a - b > 1 else "Only one was left"
        return f"There were {NUMBERS[a]} {what}. {hero.name} took {NUMBERS[b]} of them, and {left[0].lower() + left[1:]}."

    def animal_part():
        pet = rng.choice(["Rex", "Bella", "Coco", "Pip"])
        return rng.choice([
            f"A {colour} {animal} sat by the door and {sound}. {hero.name} gave it some {food}.",
            f"{S} found a lost {young} and its mother, {article(animal)}, {sound} loudly.",
            f"{hero.name} had {article(animal)} called {pet}. When {pet} was hungry, it {sound} and looked for {food}."])

    def asking():
        return rng.choice([
            f'"Where is my {colour} {obj}?" asked {friend.name}. "It is in {second_place}," {hero.name} said. So {friend.name} went to {second_place} and found the {colour} {obj}.',
            f'"What colour is your {obj}?" {friend.name} asked. "My {obj} is {colour}," said {hero.name}.',
            f'"Do you like {food}?" asked {hero.name}. "{rng.choice(["Yes, I do", "No, I do not"])}," {friend.name} answered.',
            f'"Look, {hero.name}!" said {friend.name}. "Someone left {article(colour)} {obj} here!"'])

    def losing():
        return rng.choice([
            f"Then {hero.his} {obj} broke. {friend.name} knew how to repair it, and soon the {obj} was as good as new.",
            f"{S} lost the {colour} {obj} on the way to {second_place}. {friend.name} looked for it everywhere, but the {obj} was gone.",
            f"{hero.name} bought {article(colour)} {obj} for {number(rng, rng.randint(2, 16))} coins. {S} showed the {obj} to {friend.name}."])

    def next_day():
        return rng.choice([f"The next day was {DAYS[(day + 1) % 7]}.", f"On {DAYS[(day + 1) % 7]} they came back to {place}.",
                           f"Two days later, on {DAYS[(day + 2) % 7]}, {friend.name} sent {hero.him} a letter."])

    def feeling():
        did, noun = MOODS[mood]
        return rng.choice([f"{hero.name} was {mood} and {did}.", f"{S} felt {mood}, and {friend.name} could see it in {hero.his} face.",
                           f"{S} {did}, full of {noun}."])

    def event():
        return rng.choice(events).format(S=rng.choice([S, hero.name]))

    def end():
        return rng.choice(ENDINGS[mood])

    middle = [weather_part, counting, animal_part, asking, losing, next_day, event, event]
    parts = [opening] + rng.sample(middle, rng.randint(3, 5))
    parts = list(dict.fromkeys(parts)) + [feeling, end]
    return " ".join(p() for p in parts)


# --- stories -------------------------------------------------------------------------------------------------------

def story_splits(seed=SEED):
    """(training stories, held-out stories): all different, 40 to 120 words each."""
    rng, seen = random.Random(seed), {}
    while len(seen) < TRAIN_STORIES + HELD_OUT_STORIES:
        text = story(rng)
        if 40 <= len(text.split()) <= 120:
            seen.setdefault(text, None)
    texts = list(seen)
    return texts[HELD_OUT_STORIES:], texts[:HELD_OUT_STORIES]


# --- tokenizer -----------------------------------------------------------------------------------------------------

# The split pattern of Qwen2: contractions, words with their leading character, single digits, punctuation, white space.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_tokenizer(texts, out):
    """Byte-level BPE in the layout of Qwen2's tokenizer.json: no prefix space, no post-added tokens, no unknown token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    tok.save(str(out / "tokenizer.json"))
    first = tok.token_to_id(SPECIAL[0])
    added = {str(first + i): dict(content=s, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
             for i, s in enumerate(SPECIAL)}
    write_json(out / "tokenizer_config.json", dict(
        add_bos_token=False, add_prefix_space=False, added_tokens_decoder=added, additional_special_tokens=SPECIAL[1:],
        bos_token=None, clean_up_tokenization_spaces=False, eos_token=SPECIAL[0], errors="replace",
        model_max_length=SHAPE["max_position_embeddings"], pad_token=SPECIAL[0], split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer", unk_token=None))
    return tok


def load_tokenizer(folder=HERE):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


# --- training ------------------------------------------------------------------------------------------------------

def hub_config(vocab, eos):
    """config.json as the hub's Qwen2.5 models write it."""
    return dict(architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=eos, eos_token_id=eos, hidden_act="silu",
                initializer_range=0.02, max_window_layers=SHAPE["num_hidden_layers"], model_type="qwen2",
                sliding_window=SHAPE["max_position_embeddings"], tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
                use_sliding_window=False, vocab_size=vocab, **SHAPE)


def batches(ids, rng, size):
    """Endless batches of stories of about the same length, so that little is padding; every epoch in a new order."""
    while True:
        order = sorted(rng.sample(range(len(ids)), len(ids)), key=lambda i: len(ids[i]) // 8)
        groups = [order[i:i + size] for i in range(0, len(order) - size + 1, size)]
        rng.shuffle(groups)
        for group in groups:
            yield [ids[i] for i in group]


def pad(batch, torch):
    """Right padding needs no attention mask in a causal model: no real token can look at it, and its label is ignored."""
    width = max(map(len, batch))
    rows = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for row, label, ids in zip(rows, labels, batch):
        row[:len(ids)] = label[:len(ids)] = torch.tensor(ids)
    return rows, labels


def train_model(config, ids, steps, seed, log=print):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in config.items() if k not in ("architectures", "torch_dtype", "model_type")})).float()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=TRAIN["weight_decay"]), dict(params=vectors, weight_decay=0.0)],
                            lr=TRAIN["lr"], betas=(0.9, TRAIN["beta2"]))
    source, begin, tokens, history = batches(ids, random.Random(seed), TRAIN["batch"]), time.time(), 0, {}
    model.train()
    for step in range(1, steps + 1):
        ramp = min(1.0, step / TRAIN["warmup"])
        fall = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in opt.param_groups:
            group["lr"] = TRAIN["lr"] * ramp * (0.02 + 0.98 * fall)
        rows, labels = pad(next(source), torch)
        loss = model(input_ids=rows, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN["clip"])
        opt.step()
        opt.zero_grad(set_to_none=True)
        tokens += int((labels >= 0).sum())
        if step % 100 == 0 or step == 1:
            history[step] = round(loss.item(), 4)
            log(f"step {step}/{steps} loss {loss.item():.4f} {tokens / (time.time() - begin):.0f} tokens/s", flush=True)
    return model.eval(), dict(tokens=tokens, seconds=round(time.time() - begin, 1), training_loss=history)


def save_model(model, folder):
    """bf16, one file, the tied head left out, as the hub's checkpoints are."""
    import torch
    from safetensors.torch import save_file
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def load_model(folder=HERE):
    """The saved weights in float32, as an analysis sees them."""
    import torch
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager").eval()


# --- evaluation ----------------------------------------------------------------------------------------------------

def evaluate(model, train_ids, held_ids, vocab):
    """Nats per token over the held-out tokens that have a predecessor in their story; the yardsticks are over the same tokens."""
    import torch
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in held_ids:
            row = torch.tensor([ids])
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
            count += len(ids) - 1
    targets = Counter(t for ids in held_ids for t in ids[1:])
    unigram = Counter(t for ids in train_ids for t in ids[1:])
    n = sum(unigram.values())
    pairs = Counter(p for ids in train_ids for p in zip(ids, ids[1:]))
    firsts = Counter(t for ids in train_ids for t in ids[:-1])
    p1 = lambda t: (unigram[t] + 1) / (n + vocab)
    p2 = lambda s, t: 0.95 * pairs[s, t] / max(firsts[s], 1) + 0.05 * p1(t)
    return dict(
        loss=round(total / count, 4),
        unigram_entropy=round(-sum(c / count * math.log(c / count) for c in targets.values()), 4),
        unigram_cross_entropy=round(-sum(c * math.log(p1(t)) for t, c in targets.items()) / count, 4),
        bigram_cross_entropy=round(-sum(math.log(p2(s, t)) for ids in held_ids for s, t in zip(ids, ids[1:])) / count, 4),
        tokens=count)


# --- files ---------------------------------------------------------------------------------------------------------

def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=TRAIN["steps"])
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--show", type=int, default=0, help="print this many stories and stop")
    args = parser.parse_args()

    train_texts, held_texts = story_splits(args.seed)
    if args.show:
        print("\n\n".join(train_texts[:args.show]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "corpus.jsonl", "w") as f:
        f.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in held_texts)

    os.environ["RAYON_NUM_THREADS"] = "1"
    tok = train_tokenizer(train_texts, args.out)
    eos, vocab = tok.token_to_id(SPECIAL[0]), tok.get_vocab_size()
    train_ids = [e.ids + [eos] for e in tok.encode_batch(train_texts)]
    held_ids = [e.ids for e in tok.encode_batch(held_texts)]  # as an analysis tokenises: no end token

    config = hub_config(vocab, eos)
    write_json(args.out / "config.json", config)
    model, run = train_model(config, train_ids, args.steps, args.seed)
    save_model(model, args.out)
    held = evaluate(load_model(args.out), train_ids, held_ids, vocab)

    import safetensors, tokenizers, torch, transformers
    record = dict(
        held_out_nats_per_token=held, seed=args.seed, shape=SHAPE, vocab_size=vocab,
        parameters=sum(p.numel() for p in model.parameters()),
        data=dict(training_stories=len(train_texts), held_out_stories=len(held_texts),
                  training_tokens=sum(map(len, train_ids)), longest_held_out_story=max(map(len, held_ids))),
        training=dict(TRAIN, steps=args.steps, threads=1, **run),
        versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                      tokenizers=tokenizers.__version__, safetensors=safetensors.__version__))
    write_json(args.out / "training.json", record)
    print(json.dumps(held))


if __name__ == "__main__":
    main()
