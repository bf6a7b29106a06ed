// Loads in two passes: the first lays out every packed array of a rank's share in one Arena (weight_plan.cc),
// the second reads, checks and packs them with all threads, in pieces that stay in cache (weights.cc). So
// memory peaks at the packed weights plus one buffer per thread. Internal to model/.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/jobs.h"
#include "model/weights.h"

namespace tessera {

using SchemeOf = std::function<Scheme(std::string_view linear)>;

// Rows and columns of a stored tensor [..][whole_columns] that are held here.
struct Part {
  std::string tensor;
  Slice rows, columns;
  int whole_columns = 0;
};

class WeightLoader {
 public:
  // `checkpoint` is null where only the plan is wanted.
  WeightLoader(const Checkpoint* checkpoint, const ModelConfig& config, const RankShare& share,
               SchemeOf scheme_of)
      : checkpoint_(checkpoint), config_(config), share_(share), scheme_of_(std::move(scheme_of)) {
    weights_.share = share;
  }

  // First pass: shapes, sizes and jobs. Arrays get their place when the arena exists.
  void Plan();
  const std::vector<HeldTensor>& held() const { return held_; }
  // Second pass.
  Result<Weights> Run(ThreadPool& threads, const Progress& progress);

 private:
  // How a linear [num_outputs][k] is cut: by rows, or by leaves where `leaves` are those of a row-parallel
  // one.
  struct Cut {
    int num_outputs = 0, k = 0;
    Slice rows;
    int whole_leaves = 1;
    Slice leaves = {0, 1};
  };
  Cut ByRows(int num_outputs, int k, Slice rows) const;
  Cut ByLeaves(int num_outputs, int k, Slice leaves) const;

  template <typename Packed, typename T>
  void Reserve(Packed& packed, const T* Packed::* panels);
  void Hold(const std::string& tensor, Slice rows, Slice columns, uint64_t bytes);
  void PlanLayer(int layer, LayerWeights& weights);
  void PlanUpProjections(const std::string& tensor, LayerWeights& weights);
  void PlanFeedForward(const std::string& prefix, int width, Slice leaves, FeedForward& ffn);
  void PlanLinear(const std::string& name, const Cut& cut, Linear& linear);
  void PlanBf16(const Part& part, kernels::PackedBf16& packed);
  void PlanInt8(const Part& part, kernels::PackedInt8& packed);
  void PlanFloats(const std::string& tensor, Slice values, std::vector<float>& target);
  void PlanRouter(const std::string& tensor, kernels::PackedFloat& packed);
  void PlanEmbedding();
  // `run` may use the thread's buffer as it likes.
  void AddJob(uint64_t bytes, std::function<Status(std::vector<std::byte>& buffer)> run) {
    jobs_.push_back({bytes, [this, run = std::move(run)](int thread) {
                       return run(buffers_[static_cast<size_t>(thread)]);
                     }});
  }
  // The same for a job that reads these rows of the part.
  void AddReadJob(const Part& part, Slice rows, int value_bytes,
                  std::function<Status(std::vector<std::byte>& buffer)> run) {
    AddJob(static_cast<uint64_t>(int64_t{rows.size()} * part.columns.size() * value_bytes), std::move(run));
    jobs_.back().prefetch = [this, part, rows, value_bytes] { Prefetch(part, rows, value_bytes); };
  }
  void Prefetch(const Part& part, Slice rows, int value_bytes) const;
  static Slice ColumnsToRead(const Part& part, int value_bytes);

  Status LoadBf16(const Part& part, Slice rows, const kernels::PackedBf16& packed,
                  std::vector<std::byte>& buffer) const;
  Status LoadInt8(const Part& part, Slice rows, const kernels::PackedInt8& packed,
                  std::vector<std::byte>& buffer) const;
  Status LoadUpProjections(const Part& head, const kernels::PackedBf16& key_up,
                           const kernels::PackedBf16& key_of_latent, const kernels::PackedBf16& value_up,
                           std::vector<std::byte>& buffer) const;
  Status LoadEmbedding(const Part& part) const;
  template <typename T, typename Take>
  Status ReadPieces(const Part& part, Slice rows, int panel, std::vector<std::byte>& buffer,
                    const Take& take) const;
  Status CheckFinite(const Part& part, Slice rows, const kernels::Bf16* values, int64_t stride) const;
  Result<std::vector<float>> ReadFloats(const std::string& tensor, Slice values) const;
  Status LoadStatic(const std::string& name, const std::string& beta, const Cut& cut, Linear& linear) const;
  Status LoadZeroPoint(const std::string& name, Linear& linear) const;
  Status LoadDeqScale(const std::string& name, Slice rows, Linear& linear) const;
  Status LoadQuantBias(const std::string& name, const Cut& cut, Linear& linear) const;
  Status RequireZeroOffset(const std::string& name) const;
  void LogUnequalInputs() const;

  const Checkpoint* const checkpoint_;
  const ModelConfig& config_;
  const RankShare share_;
  const SchemeOf scheme_of_;
  Weights weights_;
  size_t arena_bytes_ = 0;
  std::vector<HeldTensor> held_;
  std::vector<std::function<void()>> placements_;
  std::vector<Job> jobs_;
  std::vector<std::vector<std::byte>> buffers_;  // one for each thread
};

}  // namespace tessera
