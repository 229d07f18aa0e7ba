# Runs `start.sh` of EvalCrafter for each model. It writes into `results/` of the checkout, and one of its scripts appends to an
# existing file, so the folder is moved away after each model.

for model in "${MODELS[@]}"; do
  empty "$RESULTS/$model"
  empty "$CHECKOUT/results"
  docker run --gpus all --rm --shm-size 15G --volume "$CHECKOUT:$CHECKOUT" --volume "$LAYOUT:$LAYOUT" \
    bruceliu1/evalcrafter:v1 bash -c 'source /opt/conda/bin/activate EvalCrafter && bash "$0/start.sh" "$0" "$1"' \
    "$CHECKOUT" "$LAYOUT/$model/videos"
  mkdir -p "$RESULTS"
  mv "$CHECKOUT/results" "$RESULTS/$model"
done
