"""An engine in a process of its own that takes updates: what it says before and after each, as JSON on the last line.

sync_child.py BASE SETTINGS [CHAIN NUMBER...]     SETTINGS: JSON; "back" instead of a number is a rollback
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import engines
from xorz.vllm import client


def main():
    base, settings = sys.argv[1], json.loads(sys.argv[2])
    llm = engines.engine(base, weight_transfer_config={"backend": "xorz"}, **settings)
    said = []
    for number in (None, *sys.argv[4:]):
        if number == "back":
            client.rollback(llm)
        elif number is not None:
            client.update(llm, sys.argv[3], int(number))
        said.append([[s.tokens, s.logprob] for s in engines.ask(llm, engines.PROMPTS)])
    print("\n" + json.dumps({"said": said}), flush=True)
    engines.stop(llm)


if __name__ == "__main__":
    main()
