# Fetches the container of EvalCrafter and its checkpoints. Needs docker with the NVIDIA runtime.

[ -d "$CHECKOUT" ] || git clone https://github.com/evalcrafter/EvalCrafter "$CHECKOUT"
docker pull bruceliu1/evalcrafter:v1
(cd "$CHECKOUT/checkpoints" && bash download.sh)
