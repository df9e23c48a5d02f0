"""AutoTokenizer on what --merge writes beside a bare tokenizer.model: LLaMA's, and Llama-3's."""

import shutil
import tempfile
from pathlib import Path

from kit import KIT, agrees, prompts, real_data, skip
from transformers import AutoTokenizer

from data import load_tokenizer
from plumbing.tokenizer_json import write_tokenizer_json

for whose, name in (("LLaMA's", "tokenizer.model"), ("Llama-3's", "llama3/tokenizer.model")):
    what = f"AutoTokenizer on a folder that --merge wrote, {whose} tokenizer: ids of real prompts"
    data = real_data()
    if data is None:
        skip(what, "needs RORA_DATA")
        continue
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(KIT / "model/config.json", folder)
        shutil.copy(data / name, folder)
        write_tokenizer_json(Path(folder), Path(folder))
        theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(data / name)
        texts = prompts(data)
        right = [ours.encode(text, bos=True, eos=False) for text in texts]
        wrong = sum(a != b for a, b in zip(right, theirs(texts)["input_ids"]))
    agrees(what, wrong, within=1, shown=f"{wrong} of {len(texts):,} differ")
