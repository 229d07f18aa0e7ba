# Runs the commands of the README of T2V-CompBench, branch main, for each model.

llava="$ENVIRONMENTS/llava/bin/python"
compbench="$ENVIRONMENTS/compbench/bin/python"
cd "$CHECKOUT"
meta="$CHECKOUT/meta_data"

for model in "${MODELS[@]}"; do
  videos="$LAYOUT/$model/video"
  results="$RESULTS/$model"
  empty "$results"

  cd "$CHECKOUT/LLaVA"
  "$llava" llava/eval/eval_consistent_attr.py --video-path "$videos/consistent_attr" \
    --output-path "$results/csv_consistent_attr" --read-prompt-file "$meta/consistent_attribute_binding.json" --t2v-model "$model"
  "$llava" llava/eval/eval_dynamic_attr.py --video-path "$videos/dynamic_attr" \
    --output-path "$results/csv_dynamic_attr" --read-prompt-file "$meta/dynamic_attribute_binding.json" --t2v-model "$model"
  "$llava" llava/eval/eval_action_binding.py --video-path "$videos/action_binding" \
    --output-path "$results/csv_action_binding" --read-prompt-file "$meta/action_binding.json" --t2v-model "$model"
  "$llava" llava/eval/eval_interaction.py --video-path "$videos/interaction" \
    --output-path "$results/csv_object_interactions" --read-prompt-file "$meta/object_interactions.json" --t2v-model "$model"

  cd "$CHECKOUT/Depth-Anything"
  "$compbench" run_depth.py --video-path "$videos/spatial_relationships" --output_dir "$results/output_spatial_depth" \
    --read-prompt-file "$meta/spatial_relationships.json" --t2v-model "$model"
  cd "$CHECKOUT"
  "$compbench" Grounded-Segment-Anything/eval_spatial_relationships.py --frame_folder "$videos/frames/spatial_relationships" \
    --depth_folder "$results/output_spatial_depth" --output-path "$results/csv_spatial" \
    --read-prompt-file "$meta/spatial_relationships.json" --t2v-model "$model" \
    --output_dir_2d "$results/output_2d_spatial" --output_dir_3d "$results/output_3d_spatial"
  "$compbench" Grounded-Segment-Anything/GroundingDINO/demo/eval_numeracy.py --video-path "$videos/generative_numeracy" \
    --output-path "$results/csv_numeracy" --read-prompt-file "$meta/generative_numeracy.json" --t2v-model "$model" \
    --output_dir "$results/output_numeracy"
  "$compbench" Grounded-Segment-Anything/motion_binding_seg.py --video_folder "$videos/motion_binding" \
    --read-prompt-file "$meta/motion_binding.json" --t2v-model "$model" --total_frame "$NUM_FRAMES" --fps "$FRAME_RATE" \
    --output_dir "$results/output_motion_binding_seg"
  cd "$CHECKOUT/dot"
  for ground in foreground background; do
    "$compbench" "eval_motion_binding_$ground.py" --video_folder "$videos/video_standard/motion_binding" \
      --mask_folder "$results/output_motion_binding_seg" --read-prompt-file "$meta/motion_binding.json" \
      --t2v_model "$model" --output_path "$results/csv_motion_binding" --output_dir "$results/output_motion_binding"
  done
  "$compbench" motion_binding_score_cal.py --t2v-model "$model" --output_path "$results/csv_motion_binding"
done
