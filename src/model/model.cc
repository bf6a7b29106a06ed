// The layers in order, between embedding and head.
#include "model/model.h"

#include <algorithm>

#include "model/batch.h"
#include "model/feed_forward.h"
#include "model/linear.h"
#include "model/mla.h"
#include "model/rope.h"

namespace tessera {

using kernels::Bf16;

struct Model::Content {
  Content(const ModelConfig& model_config, const Weights& model_weights, const Peers& ranks,
          RotaryTables tables, const kernels::Kernels& table, ThreadPool& pool)
      : config(model_config),
        weights(model_weights),
        peers(ranks),
        kernels(table),
        threads(pool),
        rotary(std::move(tables)),
        mla(config, peers, rotary, kernels, threads),
        feed_forward(config, peers, kernels, threads) {}

  Status Embed(const GroupStep& step);
  void FinalNorm(const GroupStep& step, RowFailures& failures);
  void HeadRows(int first_row, int num_rows, float* logits, int64_t stride);

  const ModelConfig& config;
  const Weights& weights;
  const Peers peers;
  const kernels::Kernels& kernels;
  ThreadPool& threads;
  const RotaryTables rotary;
  Mla mla;
  FeedForwardBlock feed_forward;
  std::vector<float> residual;     // [token][hidden]
  std::vector<Bf16> head_input;    // [logit row][hidden, padded to even]
  std::vector<Bf16> gathered;      // embedding rows by rank
  std::vector<float> own_columns;  // [row][own vocabulary rows]
  std::vector<float> arrived;      // [rank][own row][that rank's vocabulary rows]
};

Result<std::unique_ptr<Model>> Model::Create(const ModelConfig& config, const Weights& weights,
                                             int max_model_len, const Peers& peers,
                                             const kernels::Kernels& kernels, ThreadPool& threads) {
  // Whatever libm says: all ranks use what rank 0's says.
  RotaryTables rotary = MakeRotaryTables(config, max_model_len);
  const auto share = [&](std::span<float> values) {
    return peers.world.Broadcast(std::as_writable_bytes(values), 0);
  };
  RETURN_IF_ERROR(share(rotary.cos));
  RETURN_IF_ERROR(share(rotary.sin));
  RETURN_IF_ERROR(share({&rotary.softmax_scale, 1}));
  return std::unique_ptr<Model>(
      new Model(std::make_unique<Content>(config, weights, peers, std::move(rotary), kernels, threads)));
}

Model::Model(std::unique_ptr<Content> content) : content_(std::move(content)) {}
Model::~Model() = default;

int64_t Model::LayerMacs(const GroupStep& step) const {
  const ModelConfig& config = content_->config;
  const LayerWeights& layer = content_->weights.layers.back();
  const auto macs = [](const Linear& linear) { return int64_t{linear.num_outputs} * linear.k; };
  const auto feed_forward = [&](const FeedForward& f) { return macs(f.gate) + macs(f.up) + macs(f.down); };
  const int64_t heads = static_cast<int64_t>(layer.key_up.size());
  int64_t per_token = macs(layer.q_a) + macs(layer.q_b) + macs(layer.kv_a) + macs(layer.o) +
                      heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim) +
                      feed_forward(layer.dense) + feed_forward(layer.shared);
  if (!layer.experts.empty()) per_token += config.num_experts_per_tok * feed_forward(layer.experts.front());
  int64_t total = 0;
  for (const SequenceSlice& slice : step.sequences) {
    const int64_t context = slice.num_computed + slice.num_tokens;
    total += slice.num_tokens * (per_token + heads * context * (config.latent_width() + config.kv_lora_rank));
  }
  return total;
}

Result<std::vector<std::string>> Model::Forward(const Step& step, KvCache& cache) {
  Content& model = *content_;
  const Topology& topology = model.peers.topology;
  SetFlushToZero();
  const Batch batch(step, topology);
  for (const int32_t block : batch.step.zero_blocks) cache.ZeroBlock(block);
  RowFailures failures(batch.num_tokens());
  RETURN_IF_ERROR(model.Embed(batch.step));
  for (int layer = 0; layer < model.config.num_layers; ++layer) {
    const LayerWeights& weights = model.weights.layers[layer];
    const bool scatter = model.config.IsMoe(layer) && topology.mode() != MoeMode::kReduce;
    const Slice own = scatter ? topology.Tokens(batch.num_tokens()) : Slice{0, batch.num_tokens()};
    float* residual = model.residual.data();
    RETURN_IF_ERROR(model.mla.Run(layer, weights, batch, scatter, cache, residual, failures));
    RETURN_IF_ERROR(model.feed_forward.Run(layer, weights, batch, own, residual, failures));
  }
  model.FinalNorm(batch.step, failures);
  std::vector<std::string> texts(batch.step.sequences.size());
  for (int t = batch.num_tokens() - 1; t >= 0; --t) {  // the first failure of a sequence stands
    if (failures.failed(t)) texts[batch.sequence[t]] = failures.Text(t);
  }
  return texts;
}

Slice Model::LogitShare(int num_rows) const {
  return SliceOf(num_rows, content_->peers.group.size(), content_->peers.group.rank());
}

Status Model::Logits(int first_row, int num_rows, float* logits) {
  Content& model = *content_;
  const int vocab = model.config.vocab_size;
  const Slice share = LogitShare(num_rows);
  if (model.weights.share.head.size() == vocab) {
    model.HeadRows(first_row + share.begin, share.size(), logits, vocab);
    return {};
  }
  // Each rank has some columns of all rows; the rows are dealt out.
  const int own_width = model.weights.share.head.size();
  const int members = model.peers.group.size();
  Grow(model.own_columns, int64_t{num_rows} * own_width);
  Grow(model.arrived, int64_t{share.size()} * vocab);
  model.HeadRows(first_row, num_rows, model.own_columns.data(), own_width);
  constexpr int64_t kBytes = sizeof(float);
  std::vector<int64_t> send_sizes(members), receive_sizes(members);
  for (int member = 0; member < members; ++member) {
    send_sizes[member] = SliceOf(num_rows, members, member).size() * own_width * kBytes;
    receive_sizes[member] = share.size() * SliceOf(vocab, members, member).size() * kBytes;
  }
  RETURN_IF_ERROR(model.peers.group.AllToAll(
      std::as_bytes(std::span(model.own_columns).first(int64_t{num_rows} * own_width)), send_sizes,
      std::as_writable_bytes(std::span(model.arrived).first(int64_t{share.size()} * vocab)), receive_sizes));
  const float* from = model.arrived.data();
  for (int member = 0; member < members; ++member) {
    const Slice columns = SliceOf(vocab, members, member);
    for (int row = 0; row < share.size(); ++row, from += columns.size())
      std::copy_n(from, columns.size(), logits + int64_t{row} * vocab + columns.begin);
  }
  return {};
}

// Logits of this rank's vocabulary rows.
void Model::Content::HeadRows(int first_row, int num_rows, float* logits, int64_t stride) {
  const kernels::PackedBf16& head = weights.lm_head;
  const int64_t hidden = config.hidden_size;
  const int tasks = NumTasks(head.num_panels(), int64_t{num_rows} * hidden * head.num_outputs * 2, threads);
  const kernels::RowMap rows{.count = num_rows};
  const int64_t padded = (hidden + 1) / 2 * 2;
  threads.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(head.num_panels(), tasks, task);
    kernels.gemm_bf16_float({head_input.data() + first_row * padded, padded}, head, rows, begin, end, logits,
                            stride);
  });
}

Status Model::Content::Embed(const GroupStep& step) {
  const int64_t hidden = config.hidden_size;
  const Slice& held = weights.share.embedding;
  residual.resize(step.tokens.size() * hidden);
  const auto widen = [&](size_t t, const Bf16* row) {
    kernels.to_float(row, config.hidden_size, residual.data() + t * hidden);
  };
  if (held.size() == config.vocab_size) {
    for (size_t t = 0; t < step.tokens.size(); ++t) widen(t, weights.embedding + step.tokens[t] * hidden);
    return {};
  }
  // The table is cut over the group: each rank gives the rows that it holds, in the order of the tokens.
  const int members = peers.group.size();
  std::vector<int64_t> first(members + 1, 0);  // where a rank's rows start
  std::vector<int> owner(step.tokens.size());
  for (size_t t = 0; t < step.tokens.size(); ++t) {
    while (step.tokens[t] >= SliceOf(config.vocab_size, members, owner[t]).end) ++owner[t];
    ++first[owner[t] + 1];
  }
  std::vector<Bf16> own;
  for (size_t t = 0; t < step.tokens.size(); ++t) {
    if (owner[t] != peers.group.rank()) continue;
    const Bf16* row = weights.embedding + (step.tokens[t] - held.begin) * hidden;
    own.insert(own.end(), row, row + hidden);
  }
  std::vector<int64_t> sizes(members);
  for (int member = 0; member < members; ++member) {
    sizes[member] = first[member + 1] * hidden * int64_t{sizeof(Bf16)};
    first[member + 1] += first[member];
  }
  gathered.resize(step.tokens.size() * hidden);
  RETURN_IF_ERROR(peers.group.AllGather(std::as_bytes(std::span(own)), sizes,
                                        std::as_writable_bytes(std::span(gathered))));
  for (size_t t = 0; t < step.tokens.size(); ++t) widen(t, gathered.data() + first[owner[t]]++ * hidden);
  return {};
}

void Model::Content::FinalNorm(const GroupStep& step, RowFailures& failures) {
  const int num_rows = static_cast<int>(step.rows.size());
  const int64_t hidden = config.hidden_size;
  const int64_t stride = (hidden + 1) / 2 * 2;
  head_input.assign(num_rows * stride, {});
  std::vector<float> normed(hidden);
  for (int r = 0; r < num_rows; ++r) {
    const int token = step.rows[r].token;
    if (!kernels.rms_norm(residual.data() + token * hidden, weights.final_norm.data(), config.hidden_size,
                          config.rms_norm_eps, normed.data())) {
      failures.Mark(token, -1, Operation::kFinalNorm);
    }
    kernels.to_bf16(normed.data(), config.hidden_size, head_input.data() + r * stride);
  }
}

}  // namespace tessera
