# The scorer of the shapes world, which reads pixels. Its scores are synthetic.

for model in "${MODELS[@]}"; do
  "$PYTHON" -m diffusers_fvg.cli shapes score "$LAYOUT/$model/video" "$CHECKOUT" "$RESULTS/$model" --name "$model"
done
