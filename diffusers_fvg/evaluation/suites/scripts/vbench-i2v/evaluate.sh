# Runs VBench-I2V for each dimension.

python="$ENVIRONMENTS/vbench/bin/python"
dimensions=(i2v_subject i2v_background camera_motion subject_consistency background_consistency motion_smoothness dynamic_degree
  aesthetic_quality imaging_quality)

cd "$CHECKOUT"
for model in "${MODELS[@]}"; do
  for dimension in "${dimensions[@]}"; do
    results="$RESULTS/$model/$dimension"
    compgen -G "$results/*_eval_results.json" > /dev/null && continue
    "$python" evaluate_i2v.py --videos_path "$LAYOUT/$model/videos" --dimension "$dimension" --ratio "$RATIO" \
      --output_path "$results"
  done
done
