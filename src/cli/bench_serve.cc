// `tessera bench serve`: load on a running server over HTTP, open loop (requests at drawn times) or closed (a
// number of clients). One thread per open request. Flags and result keys follow `vllm bench serve`.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <ctime>
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
#include "base/threads.h"
#include "cli/bench.h"
#include "cli/flags.h"
#include "cli/http_client.h"
#include "cli/json.h"
#include "cli/machine.h"
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
  double top_p = 1, min_p = 0, frequency_penalty = 0, presence_penalty = 0, repetition_penalty = 1;
  int64_t top_k = 0, logprobs = 0;
  std::vector<std::string> given;  // names of the flags that were set: of these values only such are sent
  std::string extra_body = "{}", chat_template_kwargs = "{}";
  std::string served_model_name;
  std::string ramp_up_strategy;
  double ramp_up_start_rps = 0, ramp_up_end_rps = 0;
  std::vector<std::string> metadata;
  std::string percentile_metrics = "ttft,tpot,itl";
  std::string metric_percentiles = "99";
  std::string goodput;
  std::string request_id_prefix = "bench-";
  double ready_check_timeout_sec = 0;
  bool save_result = false, save_detailed = false, append_result = false;
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
      {"served-model-name", "", TextFlag{&o.served_model_name}, "what requests name instead of model", where},
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
      {"ramp-up-strategy", "", TextFlag{&o.ramp_up_strategy, {"", "linear", "exponential"}},
       "how the request rate grows from first to last request", load},
      {"ramp-up-start-rps", "", NumberFlag{&o.ramp_up_start_rps, 0, 1e6}, "with --ramp-up-strategy", load},
      {"ramp-up-end-rps", "", NumberFlag{&o.ramp_up_end_rps, 0, 1e6}, "with --ramp-up-strategy", load},
      {"temperature", "", NumberFlag{&o.temperature, -1, 2}, "of the requests", load},
      {"top-p", "", NumberFlag{&o.top_p, 0, 1}, "of the requests", load},
      {"top-k", "", IntFlag{&o.top_k, -1, INT32_MAX}, "of the requests", load},
      {"min-p", "", NumberFlag{&o.min_p, -1e-9, 1}, "of the requests", load},
      {"frequency-penalty", "", NumberFlag{&o.frequency_penalty, -2.000001, 2}, "of the requests", load},
      {"presence-penalty", "", NumberFlag{&o.presence_penalty, -2.000001, 2}, "of the requests", load},
      {"repetition-penalty", "", NumberFlag{&o.repetition_penalty, 0, 1e3}, "of the requests", load},
      {"logprobs", "", IntFlag{&o.logprobs, 0, 1000}, "of the requests", load},
      {"chat-template-kwargs", "", JsonFlag{&o.chat_template_kwargs}, "of the requests", load},
      {"extra-body", "", JsonFlag{&o.extra_body}, "further fields of the requests", load},
      {"request-id-prefix", "", TextFlag{&o.request_id_prefix}, "of X-Request-Id", load},
      {"dataset-name", "", OnlyFlag{{"random"}}, "prompts are random", load},
      {"percentile-metrics", "", TextFlag{&o.percentile_metrics}, "of ttft, tpot, itl, e2el", result},
      {"metric-percentiles", "", TextFlag{&o.metric_percentiles}, "numbers joined by commas", result},
      {"goodput", "", TextFlag{&o.goodput}, "limits in ms, e.g. ttft:500,tpot:50,e2el:9000", result},
      {"save-result", "", BoolFlag{&o.save_result}, "write the result as JSON", result},
      {"append-result", "", BoolFlag{&o.append_result}, "as a further line of that file", result},
      {"metadata", "", ListFlag{&o.metadata}, "further members of the result, each KEY=VALUE", result},
      {"save-detailed", "", BoolFlag{&o.save_detailed}, "with one entry per request", result},
      {"result-dir", "", TextFlag{&o.result_dir}, "folder of that file", result},
      {"result-filename", "", TextFlag{&o.result_filename}, "its name", result},
  };
  const auto add = [&](FlagKind kind, const char* reason, std::vector<const char*> names) {
    for (const char* name : names) table.flags.push_back({name, "", kind, reason, ""});
  };
  add(IgnoredFlag{true}, "prompts are token ids, no tokenizer is needed", {"tokenizer", "tokenizer-mode"});
  add(IgnoredFlag{false}, "prompts are token ids, no tokenizer is needed", {"skip-tokenizer-init"});
  add(IgnoredFlag{false}, "connections are not encrypted", {"insecure"});
  add(IgnoredFlag{false}, "there is no progress bar", {"disable-tqdm"});
  add(OnlyFlag{{"0"}}, "no other requests are sent", {"probe-request-rate"});
  add(RefusedFlag{false}, "use a profiler of the system", {"profile"});
  add(RefusedFlag{false}, "take --save-detailed and a plotting program", {"plot-timeline"});
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
  std::string Options(bool chat) const;
  Result<std::string> Body(int64_t number) const;
  void Send(HttpConnection& connection, int64_t number, Measured* measured) const;

  const LoadFlags& flags_;
  const Url url_;
  const std::string model_;
  std::vector<std::string> headers_;
  SteadyClock clock_;
  std::atomic<int64_t> open_{0}, max_open_{0};
};

// Members of a request that flags ask for, each with its comma.
std::string Load::Options(bool chat) const {
  std::string text;
  const auto add = [&](const char* flag, const char* name, const auto& value) {
    if (std::ranges::find(flags_.given, flag) != flags_.given.end())
      text += Format(",\"{}\":{}", name, value);
  };
  add("top-p", "top_p", flags_.top_p);
  add("top-k", "top_k", flags_.top_k);
  add("min-p", "min_p", flags_.min_p);
  add("frequency-penalty", "frequency_penalty", flags_.frequency_penalty);
  add("presence-penalty", "presence_penalty", flags_.presence_penalty);
  add("repetition-penalty", "repetition_penalty", flags_.repetition_penalty);
  if (chat) add("logprobs", "logprobs", true);
  add("logprobs", chat ? "top_logprobs" : "logprobs", flags_.logprobs);
  if (chat && flags_.chat_template_kwargs != "{}")
    text += ",\"chat_template_kwargs\":" + flags_.chat_template_kwargs;
  return text;
}

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
      "\"ignore_eos\":{}{}}}",
      JsonQuote(model_), what, flags_.temperature, flags_.ignore_eos, Options(chat));
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

// Requests per second around request `number` of `count`.
double RateAt(const LoadFlags& o, int64_t number, int64_t count) {
  if (o.ramp_up_strategy.empty()) return o.request_rate;
  const double progress = static_cast<double>(number) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  const double start = o.ramp_up_start_rps, end = o.ramp_up_end_rps;
  return o.ramp_up_strategy == "linear" ? start + (end - start) * progress
                                        : start * std::pow(end / start, progress);
}

// Seconds after the start at which each request is sent: gaps of a gamma distribution, as upstream draws
// them.
std::vector<double> DrawStarts(const LoadFlags& o) {
  std::vector<double> starts(o.num_prompts, 0.0);
  if (std::isinf(RateAt(o, 0, o.num_prompts))) return starts;
  std::mt19937_64 random(static_cast<uint64_t>(o.seed));
  for (int64_t i = 1; i < o.num_prompts; ++i) {
    std::gamma_distribution<double> gap(o.burstiness, 1 / (RateAt(o, i, o.num_prompts) * o.burstiness));
    starts[i] = starts[i - 1] + gap(random);
  }
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

// Limits in ms by the name of the metric; a metric without one has infinity.
struct Goals {
  double ttft_ms = kInfinity, tpot_ms = kInfinity, e2el_ms = kInfinity;
  bool AreMet(const Measured& one) const {
    return one.ok && one.ttft_ms <= ttft_ms && one.tpot_ms <= tpot_ms && one.e2el_ms <= e2el_ms;
  }
};

Result<Goals> ParseGoals(const std::string& text) {
  Goals goals;
  for (const std::string& part : SplitCommas(text)) {
    const size_t colon = std::min(part.find(':'), part.size());
    const std::string name = part.substr(0, colon);
    const double limit = std::strtod(part.c_str() + std::min(colon + 1, part.size()), nullptr);
    double* goal = name == "ttft"   ? &goals.ttft_ms
                   : name == "tpot" ? &goals.tpot_ms
                   : name == "e2el" ? &goals.e2el_ms
                                    : nullptr;
    if (goal == nullptr || !(limit > 0))
      return Invalid("--goodput: '{}' is not ttft, tpot or e2el with a limit in ms", part);
    *goal = limit;
  }
  return goals;
}

// The arrays of --save-detailed, one entry per request; times in seconds.
std::string Details(const std::vector<Measured>& results, TimeNs begin) {
  std::string inputs, outputs, ttfts, itls, starts, errors;
  for (const Measured& one : results) {
    const char* comma = ttfts.empty() ? "" : ", ";
    inputs += Format("{}{}", comma, one.input_tokens);
    outputs += Format("{}{}", comma, one.output_tokens);
    ttfts += Format("{}{}", comma, one.ttft_ms / 1000);
    starts += Format("{}{}", comma, one.begin == 0 ? 0 : Seconds(one.begin - begin));
    std::vector<double> gaps;
    for (const double gap : one.itl_ms) gaps.push_back(gap / 1000);
    itls += Format("{}[{}]", comma, fmt::join(gaps, ", "));
    errors += comma + JsonQuote(one.error);
  }
  return Format(
      ", \"input_lens\": [{}], \"output_lens\": [{}], \"ttfts\": [{}], \"itls\": [{}], "
      "\"start_times\": [{}], \"errors\": [{}]",
      inputs, outputs, ttfts, itls, starts, errors);
}

// What was asked for, as members of the result, each with its comma.
std::string Asked(const LoadFlags& o, const std::string& model) {
  const auto number = [](double value) { return std::isinf(value) ? "\"inf\"" : Format("{}", value); };
  const std::time_t now = std::time(nullptr);
  std::tm local = {};
  localtime_r(&now, &local);
  char date[32];
  std::strftime(date, sizeof date, "%Y%m%d-%H%M%S", &local);
  std::string text = Format(
      ", \"date\": \"{}\", \"backend\": {}, \"model_id\": {}, \"num_prompts\": {}, \"request_rate\": {}, "
      "\"burstiness\": {}, \"max_concurrency\": {}",
      date, JsonQuote(o.backend), JsonQuote(model), o.num_prompts, number(o.request_rate), o.burstiness,
      o.max_concurrency ? Format("{}", *o.max_concurrency) : "null");
  if (!o.ramp_up_strategy.empty()) {
    text += Format(", \"ramp_up_strategy\": \"{}\", \"ramp_up_start_rps\": {}, \"ramp_up_end_rps\": {}",
                   o.ramp_up_strategy, o.ramp_up_start_rps, o.ramp_up_end_rps);
  }
  for (const std::string& part : o.metadata) {
    const size_t equals = std::min(part.find('='), part.size());
    text += Format(", {}: {}", JsonQuote(part.substr(0, equals)),
                   JsonQuote(part.substr(std::min(equals + 1, part.size()))));
  }
  return text;
}

// Prints the table and gives the JSON.
std::string Report(const LoadFlags& o, const std::string& model, const Goals& goals,
                   const std::vector<Measured>& results, int64_t max_open) {
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
  const auto good = std::ranges::count_if(results, [&](const Measured& one) { return goals.AreMet(one); });
  const std::string goodput = o.goodput.empty() ? "null" : Format("{}", static_cast<double>(good) / seconds);
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
  return json + Asked(o, model) + (o.save_detailed ? Details(results, begin) : "") + ", " +
         ResultHead("", AvailableCores()) + "}";
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

Status CheckLoadFlags(const LoadFlags& o) {
  if (!o.ramp_up_strategy.empty()) {
    if (!(o.ramp_up_start_rps > 0 && o.ramp_up_end_rps > 0))
      return Invalid("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps above 0");
    if (!std::isinf(o.request_rate))
      return Invalid("--request-rate and --ramp-up-strategy exclude each other");
  }
  for (const std::string& part : o.metadata) {
    if (part.find('=') == std::string::npos) return Invalid("--metadata: '{}' is not KEY=VALUE", part);
  }
  return {};
}

Status Save(const LoadFlags& o, const std::string& json) {
  if (!o.save_result && !o.append_result) return {};
  const std::string path = o.result_dir + "/" + o.result_filename;
  std::string before;
  if (o.append_result && FileExists(path)) {
    ASSIGN_OR_RETURN(before, ReadFile(path));
  }
  return WriteFile(path, before + json + "\n");
}

Status RunLoad(const LoadFlags& o) {
  RETURN_IF_ERROR(CheckLoadFlags(o));
  ASSIGN_OR_RETURN(const Goals goals, ParseGoals(o.goodput));
  ASSIGN_OR_RETURN(const Url base,
                   ParseUrl(o.base_url.empty() ? Format("http://{}:{}", o.host, o.port) : o.base_url));
  ASSIGN_OR_RETURN(const std::string found, FindModel(o, base));
  const std::string& model = o.served_model_name.empty() ? found : o.served_model_name;
  Url target = base;
  target.path += !o.endpoint.empty()          ? o.endpoint
                 : o.backend == "openai-chat" ? "/v1/chat/completions"
                                              : "/v1/completions";
  if (o.num_warmups > 0) Load(o, target, model).Run(o.num_warmups, std::vector<double>(o.num_warmups, 0.0));
  Load load(o, target, model);
  const std::vector<Measured> results = load.Run(o.num_prompts, DrawStarts(o));
  RETURN_IF_ERROR(Save(o, Report(o, found, goals, results, load.max_open())));
  for (const Measured& one : results) {
    if (!one.ok) return Fail(ErrorKind::kUnavailable, "some requests failed");
  }
  return {};
}

}  // namespace

int RunBenchServe(std::span<const std::string> arguments) {
  LoadFlags options;
  return RunCommand(LoadTable(options), arguments, [&](const ParsedFlags& parsed) {
    options.given = parsed.given;
    return RunLoad(options);
  });
}

}  // namespace tessera::cli
