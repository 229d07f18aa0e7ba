# Scores the videos of the shapes suite from their pixels. The scores are synthetic.

for model in "${MODELS[@]}"; do
  "$PYTHON" -m diffusers_fvg.cli shapes score "$LAYOUT/$model/video" "$CHECKOUT" "$RESULTS/$model" --name "$model"
done
