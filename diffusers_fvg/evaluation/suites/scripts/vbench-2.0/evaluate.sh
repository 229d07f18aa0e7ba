# Runs VBench-2.0 for each dimension, as its `evaluate.sh` does, but writes the results directly into the dimension's folder.

python="$ENVIRONMENTS/vbench2/bin/python"
dimensions=(Human_Anatomy Human_Identity Human_Clothes Diversity Composition Dynamic_Spatial_Relationship Dynamic_Attribute
  Motion_Order_Understanding Human_Interaction Complex_Landscape Complex_Plot Camera_Motion Motion_Rationality Mechanics
  Thermotics Material Multi-View_Consistency Instance_Preservation)

# The script opens its files by relative paths.
cd "$CHECKOUT/VBench-2.0"
for model in "${MODELS[@]}"; do
  for dimension in "${dimensions[@]}"; do
    [ -d "$LAYOUT/$model/$dimension" ] || continue
    results="$RESULTS/$model/$dimension"
    # Of two result files the scoring script takes whichever is listed last.
    compgen -G "$results/*_eval_results.json" > /dev/null && continue
    "$python" evaluate.py --videos_path "$LAYOUT/$model/$dimension" --dimension "$dimension" --output_path "$results"
  done
done
