// `tessera bench serve`: load on a running server over HTTP, open loop (requests at drawn times) or closed (a
// number of clients). One thread per open request. Flags and result keys follow `vllm bench serve`.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/file.h"
#include "base/format.h"
#include "base/random.h"
#include "cli/bench.h"
#include "cli/flags.h"
#include "cli/http_client.h"
#include "cli/json.h"
#include "cli/statistics.h"

namespace tessera::cli {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kLowestId = 3, kHighestId = 1000;  // prompt ids that every tokenizer of this family has

struct LoadFlags {
  std::string backend = "openai";
  std::string base_url;
  std::string host = "127.0.0.1";
  int64_t port = 8000;
  std::string endpoint;  // empty: by backend
  std::string model;
  std::vector<std::string> api_key, headers;
  int64_t num_prompts = 1000;
  int64_t num_warmups = 0;
  int64_t seed = 0;
  int64_t input_len = 1024;
  int64_t output_len = 128;
  double request_rate = kInfinity;
  double burstiness = 1;
  std::optional<int64_t> max_concurrency;
  bool ignore_eos = false;
  double temperature = 0;
  std::string extra_body = "{}";
  std::string percentile_metrics = "ttft,tpot,itl";
  std::string metric_percentiles = "99";
  std::string goodput;
  std::string request_id_prefix = "bench-";
  double ready_check_timeout_sec = 0;
  bool save_result = false, save_detailed = false;
  std::string result_dir = ".";
  std::string result_filename = "bench-serve.json";
};

FlagTable LoadTable(LoadFlags& o) {
  FlagTable table{
      .command = "tessera bench serve", .summary = "Load on a running server, streamed.", .flags = {}};
  const char* where = "Server";
  const char* load = "Load";
  const char* result = "Result";
  table.flags = {
      {"backend", "", TextFlag{&o.backend, {"openai", "vllm", "openai-chat"}}, "which endpoint", where},
      {"base-url", "", TextFlag{&o.base_url}, "instead of host and port", where},
      {"host", "", TextFlag{&o.host}, "the server's", where},
      {"port", "", IntFlag{&o.port, 1, 65535}, "the server's", where},
      {"endpoint", "", TextFlag{&o.endpoint}, "empty: by backend", where},
      {"model", "", TextFlag{&o.model}, "empty: the server's first", where},
      {"api-key", "", ListFlag{&o.api_key}, "bearer token", where},
      {"header", "", ListFlag{&o.headers}, "further headers, each K=V", where},
      {"ready-check-timeout-sec", "", NumberFlag{&o.ready_check_timeout_sec, -1, 86400}, "wait for /health",
       where},
      {"num-prompts", "", IntFlag{&o.num_prompts, 1, 10'000'000}, "requests", load},
      {"num-warmups", "", IntFlag{&o.num_warmups, 0, 1'000'000}, "unmeasured requests before", load},
      {"seed", "", IntFlag{&o.seed, 0, INT64_MAX}, "of prompts and arrivals", load},
      {"random-input-len", "", IntFlag{&o.input_len, 1, 1 << 24, true}, "tokens of a prompt", load},
      {"random-output-len", "", IntFlag{&o.output_len, 1, 1 << 24, true}, "tokens of an answer", load},
      {"input-len", "", IntFlag{&o.input_len, 1, 1 << 24, true}, "the same as random-input-len", load},
      {"output-len", "", IntFlag{&o.output_len, 1, 1 << 24, true}, "the same as random-output-len", load},
      {"request-rate", "", NumberFlag{&o.request_rate, 0, kInfinity}, "requests per second; inf: all at once",
       load},
      {"burstiness", "", NumberFlag{&o.burstiness, 0, 1e6}, "1: Poisson; less: in bursts", load},
      {"max-concurrency", "", OptionalIntFlag{&o.max_concurrency, 1, 100000}, "clients (default: no limit)",
       load},
      {"ignore-eos", "", BoolFlag{&o.ignore_eos}, "every answer has its full length", load},
      {"temperature", "", NumberFlag{&o.temperature, -1, 2}, "of the requests", load},
      {"extra-body", "", JsonFlag{&o.extra_body}, "further fields of the requests", load},
      {"request-id-prefix", "", TextFlag{&o.request_id_prefix}, "of X-Request-Id", load},
      {"dataset-name", "", OnlyFlag{{"random"}}, "prompts are random", load},
      {"percentile-metrics", "", TextFlag{&o.percentile_metrics}, "of ttft, tpot, itl, e2el", result},
      {"metric-percentiles", "", TextFlag{&o.metric_percentiles}, "numbers joined by commas", result},
      {"goodput", "", TextFlag{&o.goodput}, "limits in ms, e.g. ttft:500,tpot:50,e2el:9000", result},
      {"save-result", "", BoolFlag{&o.save_result}, "write the result as JSON", result},
      {"save-detailed", "", BoolFlag{&o.save_detailed}, "with one entry per request", result},
      {"result-dir", "", TextFlag{&o.result_dir}, "folder of that file", result},
      {"result-filename", "", TextFlag{&o.result_filename}, "its name", result},
  };
  return table;
}

std::vector<std::string> SplitCommas(std::string_view text) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    const size_t end = std::min(text.find(','), text.size());
    if (end > 0) parts.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return parts;
}

struct Measured {
  bool ok = false;
  std::string error;
  TimeNs begin = 0, end = 0;
  double ttft_ms = 0, tpot_ms = 0, e2el_ms = 0;
  std::vector<double> itl_ms;
  int64_t input_tokens = 0, output_tokens = 0;
  std::vector<TimeNs> token_times;
};

// Whether a chunk carries a choice, without parsing it: at thousands of chunks per second the client would
// otherwise take the server's cores.
bool HasChoice(std::string_view chunk) {
  size_t place = chunk.find("\"choices\"");
  if (place == std::string_view::npos) return false;
  place = chunk.find('[', place);
  place = place == std::string_view::npos ? place : chunk.find_first_not_of(" \n", place + 1);
  return place != std::string_view::npos && chunk[place] == '{';
}

class Load {
 public:
  Load(const LoadFlags& flags, Url url, std::string model)
      : flags_(flags), url_(std::move(url)), model_(std::move(model)) {
    if (!flags.api_key.empty()) headers_.push_back("Authorization: Bearer " + flags.api_key[0]);
    for (std::string header : flags.headers) {
      if (const size_t equals = header.find('='); equals != std::string::npos)
        header.replace(equals, 1, ": ");
      headers_.push_back(header);
    }
  }

  std::vector<Measured> Run(int64_t num_requests, const std::vector<double>& starts_s);
  int64_t max_open() const { return max_open_; }

 private:
  Result<std::string> Body(int64_t number) const;
  void Send(HttpConnection& connection, int64_t number, Measured* measured) const;

  const LoadFlags& flags_;
  const Url url_;
  const std::string model_;
  std::vector<std::string> headers_;
  SteadyClock clock_;
  std::atomic<int64_t> open_{0}, max_open_{0};
};

Result<std::string> Load::Body(int64_t number) const {
  RandomStream random(static_cast<uint64_t>(flags_.seed), static_cast<uint64_t>(number));
  std::string prompt;
  const bool chat = flags_.backend == "openai-chat";
  for (int64_t i = 0; i < flags_.input_len; ++i) {
    const uint32_t id = kLowestId + random.Below(kHighestId - kLowestId);
    // Chat takes text: short words, about one token each.
    prompt += chat ? Format("{}{}", i == 0 ? "" : " ", static_cast<char>('a' + id % 26))
                   : Format("{}{}", i == 0 ? "" : ",", id);
  }
  const std::string what =
      chat ? Format("\"messages\":[{{\"role\":\"user\",\"content\":\"{}\"}}],\"max_completion_tokens\":{}",
                    prompt, flags_.output_len)
           : Format("\"prompt\":[{}],\"max_tokens\":{}", prompt, flags_.output_len);
  const std::string body = Format(
      "{{\"model\":{},{},\"temperature\":{},\"stream\":true,\"stream_options\":{{\"include_usage\":true}},"
      "\"ignore_eos\":{}}}",
      JsonQuote(model_), what, flags_.temperature, flags_.ignore_eos);
  if (flags_.extra_body == "{}") return body;
  std::string replaced;
  return JsonMerge(body, flags_.extra_body, &replaced);
}

void Load::Send(HttpConnection& connection, int64_t number, Measured* measured) const {
  const auto body = Body(number);
  if (!body) {
    measured->error = body.error().message;
    return;
  }
  std::vector<std::string> headers = headers_;
  headers.push_back(Format("X-Request-Id: {}{}", flags_.request_id_prefix, number));
  SseReader events;
  std::string usage;
  measured->begin = clock_.Now();
  const auto answer = connection.Send("POST", "", headers, *body, [&](std::string_view bytes) {
    const TimeNs now = clock_.Now();
    return events.Push(bytes, [&](std::string_view data) {
      if (data == "[DONE]") return true;
      if (HasChoice(data)) measured->token_times.push_back(now);
      if (data.find("\"completion_tokens\"") != std::string_view::npos) usage = data;
      if (data.starts_with("{\"error\"")) measured->error = data;
      return true;
    });
  });
  measured->end = clock_.Now();
  if (!answer)
    measured->error = answer.error().message;
  else if (answer->status != 200)
    measured->error = Format("status {}: {}", answer->status, answer->body);
  else if (measured->token_times.empty() && measured->error.empty())
    measured->error = "no chunk had a choice";
  if (!measured->error.empty()) return;
  measured->ok = true;
  const auto& times = measured->token_times;
  measured->output_tokens =
      static_cast<int64_t>(JsonNumber(usage, "/usage/completion_tokens").value_or(times.size()));
  measured->input_tokens =
      static_cast<int64_t>(JsonNumber(usage, "/usage/prompt_tokens").value_or(flags_.input_len));
  measured->ttft_ms = (times.front() - measured->begin) * 1e-6;
  measured->e2el_ms = (times.back() - measured->begin) * 1e-6;
  for (size_t i = 1; i < times.size(); ++i) measured->itl_ms.push_back((times[i] - times[i - 1]) * 1e-6);
  if (measured->output_tokens > 1) {
    measured->tpot_ms =
        (measured->e2el_ms - measured->ttft_ms) / static_cast<double>(measured->output_tokens - 1);
  }
}

std::vector<Measured> Load::Run(int64_t num_requests, const std::vector<double>& starts_s) {
  std::vector<Measured> results(num_requests);
  std::atomic<int64_t> next{0};
  const auto begin = std::chrono::steady_clock::now();
  const auto client = [&] {
    HttpConnection connection(url_, std::chrono::minutes(30));
    for (int64_t i = 0; (i = next.fetch_add(1)) < num_requests;) {
      std::this_thread::sleep_until(begin + std::chrono::duration_cast<std::chrono::nanoseconds>(
                                                std::chrono::duration<double>(starts_s[i])));
      const int64_t open = ++open_;
      for (int64_t seen = max_open_; open > seen && !max_open_.compare_exchange_weak(seen, open);) {
      }
      Send(connection, i, &results[i]);
      --open_;
    }
  };
  const int64_t num_clients = std::min(num_requests, flags_.max_concurrency.value_or(4096));
  std::vector<std::thread> clients;
  for (int64_t i = 1; i < num_clients; ++i) clients.emplace_back(client);
  client();
  for (std::thread& thread : clients) thread.join();
  return results;
}

// Seconds after the start at which each request is sent: gaps of a gamma distribution, as upstream draws
// them.
std::vector<double> DrawStarts(const LoadFlags& o) {
  std::vector<double> starts(o.num_prompts, 0.0);
  if (std::isinf(o.request_rate)) return starts;
  std::mt19937_64 random(static_cast<uint64_t>(o.seed));
  std::gamma_distribution<double> gap(o.burstiness, 1 / (o.request_rate * o.burstiness));
  for (size_t i = 1; i < starts.size(); ++i) starts[i] = starts[i - 1] + gap(random);
  return starts;
}

// Most tokens that came within one second.
int64_t PeakTokens(const std::vector<Measured>& results, TimeNs begin) {
  std::vector<int64_t> seconds;
  for (const Measured& one : results) {
    for (const TimeNs time : one.token_times) {
      const size_t second = static_cast<size_t>((time - begin) / 1'000'000'000);
      if (second >= seconds.size()) seconds.resize(second + 1);
      ++seconds[second];
    }
  }
  return seconds.empty() ? 0 : *std::max_element(seconds.begin(), seconds.end());
}

Result<double> Goodput(const LoadFlags& o, const std::vector<Measured>& results, double duration_s) {
  int64_t good = 0;
  std::vector<std::pair<std::string, double>> limits;
  for (const std::string& part : SplitCommas(o.goodput)) {
    const size_t colon = std::min(part.find(':'), part.size());
    const std::string name = part.substr(0, colon);
    const double limit = std::strtod(part.c_str() + std::min(colon + 1, part.size()), nullptr);
    if ((name != "ttft" && name != "tpot" && name != "e2el") || limit <= 0) {
      return Invalid("--goodput: '{}' is not ttft, tpot or e2el with a limit in ms", part);
    }
    limits.emplace_back(name, limit);
  }
  for (const Measured& one : results) {
    bool fits = one.ok;
    for (const auto& [name, limit] : limits) {
      fits = fits && (name == "ttft" ? one.ttft_ms : name == "tpot" ? one.tpot_ms : one.e2el_ms) <= limit;
    }
    good += fits;
  }
  return static_cast<double>(good) / duration_s;
}

// The arrays of --save-detailed.
std::string Details(const std::vector<Measured>& results) {
  std::string ttfts, lengths, errors;
  for (const Measured& one : results) {
    const char* comma = ttfts.empty() ? "" : ", ";
    ttfts += Format("{}{}", comma, one.ttft_ms / 1000);
    lengths += Format("{}{}", comma, one.output_tokens);
    errors += comma + JsonQuote(one.error);
  }
  return Format(", \"ttfts\": [{}], \"output_lens\": [{}], \"errors\": [{}]", ttfts, lengths, errors);
}

// Prints the table and gives the JSON.
Result<std::string> Report(const LoadFlags& o, const std::vector<Measured>& results, int64_t max_open) {
  std::vector<double> values[4];  // ttft, tpot, itl, e2el
  int64_t completed = 0, input = 0, output = 0;
  TimeNs begin = std::numeric_limits<TimeNs>::max(), end = 0;
  for (const Measured& one : results) {
    begin = std::min(begin, one.begin == 0 ? begin : one.begin);
    end = std::max(end, one.end);
    if (!one.ok) continue;
    ++completed;
    input += one.input_tokens;
    output += one.output_tokens;
    values[0].push_back(one.ttft_ms);
    if (one.output_tokens > 1) values[1].push_back(one.tpot_ms);
    values[2].insert(values[2].end(), one.itl_ms.begin(), one.itl_ms.end());
    values[3].push_back(one.e2el_ms);
  }
  const double seconds = std::max(1e-9, Seconds(end - begin));
  ASSIGN_OR_RETURN(const double goodput, Goodput(o, results, seconds));
  std::string json = Format(
      "{{\"duration\": {}, \"completed\": {}, \"failed\": {}, \"total_input_tokens\": {}, "
      "\"total_output_tokens\": {}, "
      "\"request_throughput\": {}, \"request_goodput\": {}, \"output_throughput\": {}, "
      "\"total_token_throughput\": {}, "
      "\"max_output_tokens_per_s\": {}, \"max_concurrent_requests\": {}",
      seconds, completed, static_cast<int64_t>(results.size()) - completed, input, output,
      completed / seconds, goodput, output / seconds, (input + output) / seconds, PeakTokens(results, begin),
      max_open);
  fmt::print(
      "{} of {} requests in {:.2f} s: {:.2f} requests/s, {:.1f} generated tokens/s, {:.1f} tokens/s in all\n",
      completed, results.size(), seconds, completed / seconds, output / seconds, (input + output) / seconds);
  const char* names[] = {"ttft", "tpot", "itl", "e2el"};
  for (int i = 0; i < 4; ++i) {
    const Statistics numbers(std::move(values[i]));
    json += Format(", \"mean_{0}_ms\": {1}, \"median_{0}_ms\": {2}, \"std_{0}_ms\": {3}", names[i],
                   numbers.Mean(), numbers.Percentile(50), numbers.Deviation());
    std::string line = Format("  {:<5} mean {:9.3f} ms, median {:9.3f} ms", names[i], numbers.Mean(),
                              numbers.Percentile(50));
    for (const std::string& percent : SplitCommas(o.metric_percentiles)) {
      const double value = numbers.Percentile(std::strtod(percent.c_str(), nullptr));
      json += Format(", \"p{}_{}_ms\": {}", percent, names[i], value);
      line += Format(", p{} {:9.3f} ms", percent, value);
    }
    if (("," + o.percentile_metrics + ",").find(Format(",{},", names[i])) != std::string::npos)
      fmt::print("{}\n", line);
  }
  for (const Measured& one : results) {
    if (one.ok) continue;
    fmt::print(stderr, "the first failure: {}\n", one.error);
    break;
  }
  return json + (o.save_detailed ? Details(results) : "") + "}";
}

Result<std::string> FindModel(const LoadFlags& o, const Url& base) {
  HttpConnection connection(base, std::chrono::seconds(30));
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::duration<double>(o.ready_check_timeout_sec);
  for (;;) {
    const auto health = connection.Send("GET", "/health", {}, "");
    if (health && health->status == 200) break;
    if (std::chrono::steady_clock::now() >= deadline) {
      return Fail(ErrorKind::kUnavailable, "the server is not ready: {}",
                  health ? Format("/health gives {}", health->status) : health.error().message);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  if (!o.model.empty()) return o.model;
  std::vector<std::string> headers;
  if (!o.api_key.empty()) headers.push_back("Authorization: Bearer " + o.api_key[0]);
  ASSIGN_OR_RETURN(const HttpAnswer answer, connection.Send("GET", "/v1/models", headers, ""));
  const auto id = JsonString(answer.body, "/data/0/id");
  if (!id) return Fail(ErrorKind::kUnavailable, "/v1/models gives {}: {}", answer.status, answer.body);
  return *id;
}

Status RunLoad(const LoadFlags& o) {
  ASSIGN_OR_RETURN(const Url base,
                   ParseUrl(o.base_url.empty() ? Format("http://{}:{}", o.host, o.port) : o.base_url));
  ASSIGN_OR_RETURN(const std::string model, FindModel(o, base));
  Url target = base;
  target.path += !o.endpoint.empty()          ? o.endpoint
                 : o.backend == "openai-chat" ? "/v1/chat/completions"
                                              : "/v1/completions";
  if (o.num_warmups > 0) Load(o, target, model).Run(o.num_warmups, std::vector<double>(o.num_warmups, 0.0));
  Load load(o, target, model);
  const std::vector<Measured> results = load.Run(o.num_prompts, DrawStarts(o));
  ASSIGN_OR_RETURN(const std::string json, Report(o, results, load.max_open()));
  if (o.save_result) RETURN_IF_ERROR(WriteFile(o.result_dir + "/" + o.result_filename, json + "\n"));
  for (const Measured& one : results) {
    if (!one.ok) return Fail(ErrorKind::kUnavailable, "some requests failed");
  }
  return {};
}

}  // namespace

int RunBenchServe(std::span<const std::string> arguments) {
  LoadFlags options;
  const FlagTable table = LoadTable(options);
  const std::string help = HelpText(table);
  const auto parsed = ParseFlags(table, arguments);
  if (parsed && parsed->help) {
    fmt::print("{}", help);
    return 0;
  }
  const Status status = parsed ? RunLoad(options) : Status(std::unexpected(parsed.error()));
  if (status) return 0;
  std::fflush(stdout);
  fmt::print(stderr, "tessera bench serve: {}\n", status.error().message);
  return status.error().kind == ErrorKind::kInvalid ? 2 : 1;
}

}  // namespace tessera::cli
