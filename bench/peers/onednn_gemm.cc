// int8 matrix products by oneDNN, timed: activations u8 [M, K] times weights s8 [K, N], to s32, all cores.
// The weights are reordered once into the layout that the library asks for; several copies take turns, so
// that they come from memory as those of a model do. Runs are warm. Prints one line of JSON for each M. Built
// by bench/peers_prepare.py, run by bench/peers.py; no part of Tessera.
//
// usage: onednn_gemm TIME_MS K N M...
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <oneapi/dnnl/dnnl.hpp>

namespace {

using Clock = std::chrono::steady_clock;
using dnnl::memory;

constexpr size_t kWeightBytes = size_t{256} << 20;  // of all copies: more than a core complex's cache

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void FillRandom(const memory& target, size_t num_bytes) {
  auto* bytes = static_cast<uint8_t*>(target.get_data_handle());
  std::minstd_rand random(1);
  for (size_t i = 0; i < num_bytes; ++i) bytes[i] = static_cast<uint8_t>(random() >> 8);
}

void Measure(const dnnl::engine& engine, dnnl::stream& stream, double seconds, int64_t m, int64_t k,
             int64_t n) {
  const memory::desc activations({m, k}, memory::data_type::u8, memory::format_tag::ab);
  const memory::desc any_weights({k, n}, memory::data_type::s8, memory::format_tag::any);
  const memory::desc plain_weights({k, n}, memory::data_type::s8, memory::format_tag::ab);
  const memory::desc products({m, n}, memory::data_type::s32, memory::format_tag::ab);
  const dnnl::matmul::primitive_desc plan({activations, any_weights, products}, engine);
  memory x(activations, engine), plain(plain_weights, engine), y(products, engine);
  FillRandom(x, static_cast<size_t>(m * k));
  FillRandom(plain, static_cast<size_t>(k * n));
  std::vector<memory> copies;
  while (copies.size() * static_cast<size_t>(k * n) < kWeightBytes) {
    copies.emplace_back(plan.weights_desc(), engine);
    dnnl::reorder(plain, copies.back()).execute(stream, plain, copies.back());
    stream.wait();
  }
  const dnnl::matmul product(plan);
  size_t turn = 0;
  const auto run = [&] {
    const memory& weights = copies[turn++ % copies.size()];
    product.execute(stream, {{DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, y}});
    stream.wait();
  };
  const auto start = Clock::now();
  while (SecondsSince(start) < seconds / 4) run();  // warm
  std::vector<double> times;
  const auto begin = Clock::now();
  while (SecondsSince(begin) < seconds || times.size() < 5) {
    const auto call = Clock::now();
    run();
    times.push_back(SecondsSince(call));
  }
  std::ranges::nth_element(times, times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2));
  const double median = times[times.size() / 2];
  const auto operations = static_cast<double>(2 * m * k * n);
  std::printf(R"({"m": %lld, "k": %lld, "n": %lld, "gops": %.2f, "implementation": "%s"})" "\n",
              static_cast<long long>(m), static_cast<long long>(k), static_cast<long long>(n),
              operations / median / 1e9, plan.impl_info_str());
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) {
    std::fprintf(stderr, "usage: onednn_gemm TIME_MS K N M...\n");
    return 2;
  }
  const double seconds = std::stod(arguments[1]) / 1000;
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  for (int i = 4; i < count; ++i) {
    Measure(engine, stream, seconds, std::stoll(arguments[i]), std::stoll(arguments[2]),
            std::stoll(arguments[3]));
  }
  const dnnl_version_t* version = dnnl_version();
  std::printf(R"({"version": "%d.%d.%d"})" "\n", version->major, version->minor, version->patch);
  return 0;
}
