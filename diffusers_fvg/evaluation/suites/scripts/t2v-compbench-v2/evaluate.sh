# Runs the commands of the README of T2V-CompBench, branch V2, for each model.

llava="$ENVIRONMENTS/llava/bin/python"
compbench="$ENVIRONMENTS/compbench/bin/python"

for model in "${MODELS[@]}"; do
  videos="$LAYOUT/$model/video"
  results="$RESULTS/$model"
  # The scripts add to files that are there, and then take their own last row for a video.
  empty "$results"

  cd "$CHECKOUT/LLaVA"
  "$llava" llava/eval/compbench_eval_consistent_attr.py --video-path "$videos/consistent_attr" \
    --output-path "$results/csv_consistent_attr" --read-prompt-file ../meta_data/consistent_attribute_binding.json \
    --t2v-model "$model"
  "$llava" llava/eval/compbench_eval_dynamic_attr.py --video-path "$videos/dynamic_attr" \
    --output-path "$results/csv_dynamic_attr" --read-prompt-file ../meta_data/dynamic_attribute_binding.json \
    --t2v-model "$model"
  "$llava" llava/eval/compbench_eval_action_binding.py --video-path "$videos/action_binding" \
    --output-path "$results/csv_action_binding" --read-prompt-file ../meta_data/action_binding.json --t2v-model "$model"
  "$llava" llava/eval/compbench_eval_interaction.py --video-path "$videos/interaction" \
    --output-path "$results/csv_object_interactions" --read-prompt-file ../meta_data/object_interactions.json \
    --t2v-model "$model"

  cd "$CHECKOUT"
  "$compbench" Grounded-Segment-Anything/compbench_eval_spatial_relationships.py \
    --video-path "$videos/spatial_relationships" --depth_folder "$results/output_spatial_depth" \
    --output-path "$results/csv_spatial" --read-prompt-file meta_data/spatial_relationships.json \
    --t2v-model "$model" --output_dir "$results/output_spatial"
  "$compbench" Grounded-Segment-Anything/GroundingDINO/demo/compbench_eval_numeracy.py \
    --video-path "$videos/generative_numeracy" --output-path "$results/csv_numeracy" \
    --read-prompt-file meta_data/generative_numeracy.json --t2v-model "$model" --output_dir "$results/output_numeracy"
  "$compbench" Grounded-Segment-Anything/compbench_motion_binding_seg.py --video-path "$videos/motion_binding" \
    --read-prompt-file meta_data/motion_binding.json --t2v-model "$model" --total_frame "$NUM_FRAMES" --fps "$FRAME_RATE" \
    --output_dir "$results/output_motion_binding_seg"
  cd "$CHECKOUT/dot"
  "$compbench" compbench_eval_motion_binding.py --video-path "$videos/video_standard/motion_binding" \
    --mask_folder "$results/output_motion_binding_seg" --read-prompt-file ../meta_data/motion_binding.json \
    --t2v_model "$model" --output_path "$results/csv_motion_binding" --output_dir "$results/output_motion_binding"
done
