#!/usr/bin/env bash
# Plan a case from nothing, then measure its drawn configurations and the plan's choice, on one GPU.
#
#   regret_on_card.sh GPU CORES MODEL SEQ CASES.jsonl OUT UNTIL [TRACES.sqlite3]
#
# GPU: its number. CORES: those to stay on, such as 0-15, so that two of these do not disturb each
# other. UNTIL: seconds after which no measurement is begun. TRACES: a trace cache to start from; it
# spares the search's time and changes no result. OUT gets plan-*.json, probes-*.jsonl (the plan's)
# and all-*.jsonl (the exhaustive measurement), and each goes on where it was.
set -u
export CUDA_VISIBLE_DEVICES=$1
cores=$2 model=$3 seq=$4 cases=$5 out=$6 until=$7 traces=${8:-}
name=$model-$seq
export LORA_ADVISOR_CACHE=${TMPDIR:-/tmp}/cache-$name
mkdir -p "$LORA_ADVISOR_CACHE" "$out"
[ -n "$traces" ] && cp "$traces" "$LORA_ADVISOR_CACHE/traces.sqlite3"
here=$(dirname "$0")
start=$SECONDS
if [ ! -s "$out/plan-$name.json" ]; then
  taskset -c "$cores" python3 -m lora_advisor.cli plan --model "$model" --seq "$seq" --vram 8 \
    --budget 120s --record "$out/probes-$name.jsonl" --out "$out/plan-$name.json" 2>&1 |
    cut -c1-200 | while IFS= read -r line; do echo "$name $((SECONDS - start)) s: $line"; done
fi
choice=$LORA_ADVISOR_CACHE/choice.jsonl
python3 - "$out/plan-$name.json" > "$choice" <<'PYTHON'
import json, sys
config = json.load(open(sys.argv[1]))["chosen"]["config"]
config["accumulation"] = min(2, config["accumulation"])
print(json.dumps(config))
PYTHON
cat "$choice" "$cases" > "$LORA_ADVISOR_CACHE/cases.jsonl"
left=$((until - (SECONDS - start)))
taskset -c "$cores" python3 "$here/measure_configurations.py" "$LORA_ADVISOR_CACHE/cases.jsonl" \
  --record "$out/all-$name.jsonl" --until $left ${AGAIN:+--again $AGAIN} 2>&1 | cut -c1-200
