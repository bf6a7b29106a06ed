// The layers in order, between embedding and head.
#include "model/model.h"

#include "model/batch.h"
#include "model/feed_forward.h"
#include "model/linear.h"
#include "model/mla.h"
#include "model/rope.h"

namespace tessera {

struct Model::Content {
  Content(const ModelConfig& model_config, const Weights& model_weights, int max_model_len,
          const kernels::Kernels& table, ThreadPool& pool)
      : config(model_config),
        weights(model_weights),
        kernels(table),
        threads(pool),
        rotary(MakeRotaryTables(model_config, max_model_len)),
        mla(config, rotary, kernels, threads),
        feed_forward(config, kernels, threads) {}

  void Embed(const GroupStep& step);
  void FinalNorm(const GroupStep& step, RowFailures& failures);

  const ModelConfig& config;
  const Weights& weights;
  const kernels::Kernels& kernels;
  ThreadPool& threads;
  const RotaryTables rotary;
  Mla mla;
  FeedForwardBlock feed_forward;
  std::vector<float> residual;            // [token][hidden]
  std::vector<kernels::Bf16> head_input;  // [logit row][hidden, padded to even]
};

Model::Model(const ModelConfig& config, const Weights& weights, int max_model_len,
             const kernels::Kernels& kernels, ThreadPool& threads)
    : content_(std::make_unique<Content>(config, weights, max_model_len, kernels, threads)) {}
Model::~Model() = default;

int64_t Model::WorkspaceBytes(const ModelConfig& config, int num_tokens, int num_threads) {
  return Mla::WorkspaceBytes(config, num_tokens, num_threads) +
         FeedForwardBlock::WorkspaceBytes(config, num_tokens) + int64_t{4} * num_tokens * config.hidden_size;
}

std::vector<std::string> Model::Forward(const GroupStep& step, KvCache& cache) {
  Content& model = *content_;
  SetFlushToZero();
  for (const int32_t block : step.zero_blocks) cache.ZeroBlock(block);
  const Batch batch(step);
  RowFailures failures(batch.num_tokens());
  model.Embed(step);
  for (int layer = 0; layer < model.config.num_layers; ++layer) {
    const LayerWeights& weights = model.weights.layers[layer];
    model.mla.Run(layer, weights, batch, cache, model.residual.data(), failures);
    model.feed_forward.Run(layer, weights, batch.num_tokens(), model.residual.data(), failures);
  }
  model.FinalNorm(step, failures);
  std::vector<std::string> texts(step.sequences.size());
  for (int t = batch.num_tokens() - 1; t >= 0; --t) {  // the first failure of a sequence stands
    if (failures.failed(t)) texts[batch.sequence[t]] = failures.Text(t);
  }
  return texts;
}

void Model::Logits(int first_row, int num_rows, float* logits) {
  Content& model = *content_;
  const kernels::PackedBf16& head = model.weights.lm_head;
  const int64_t hidden = model.config.hidden_size;
  const int vocab = model.config.vocab_size;
  const int tasks = NumTasks(head.num_panels(), int64_t{num_rows} * hidden * vocab * 2, model.threads);
  const kernels::RowMap rows{.count = num_rows};
  const int64_t stride = (hidden + 1) / 2 * 2;
  model.threads.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = ShareOf(head.num_panels(), tasks, task);
    model.kernels.gemm_bf16_float({model.head_input.data() + first_row * stride, stride}, head, rows, begin,
                                  end, logits, vocab);
  });
}

void Model::Content::Embed(const GroupStep& step) {
  const int64_t hidden = config.hidden_size;
  residual.resize(step.tokens.size() * hidden);
  for (size_t t = 0; t < step.tokens.size(); ++t) {
    kernels.to_float(weights.embedding + step.tokens[t] * hidden, config.hidden_size,
                     residual.data() + t * hidden);
  }
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
      failures.Mark(token, -1, "the final norm");
    }
    kernels.to_bf16(normed.data(), config.hidden_size, head_input.data() + r * stride);
  }
}

}  // namespace tessera
