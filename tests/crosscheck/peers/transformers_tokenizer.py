"""AutoTokenizer on a folder that holds a bare tokenizer.model, as Meta publishes it."""

import shutil
import tempfile

from kit import KIT, deviates, prompts, real_data, skip
from transformers import AutoTokenizer

from data import load_tokenizer

what = "AutoTokenizer on a folder with config.json and LLaMA's tokenizer.model alone"
data = real_data()
if data is None:
    skip(what, "needs RORA_DATA")
else:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(KIT / "model/config.json", folder)
        shutil.copy(data / "tokenizer.model", folder)
        theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(data)
        texts = prompts(data)
        wrong = sum(theirs(t)["input_ids"] != ours.encode(t, bos=True, eos=False) for t in texts)
    deviates(
        f"{what}: other ids than SentencePiece's",
        wrong / len(texts),
        seen="5.23.0",
        shown=f"{wrong:,} of {len(texts):,} prompts",
    )
