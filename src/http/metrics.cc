// The registry and its text. See metrics.h.
#include "http/metrics.h"

#include <dirent.h>
#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/summary.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "base/file.h"
#include "base/json.h"

namespace tessera {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;
using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::map<std::string, std::string>;

const Buckets kStepTokens = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
const Buckets kFirstToken = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                             1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
const Buckets kInterToken = {.01, .025, .05, .075, .1,  .15, .2, .3, .4, .5,
                             .75, 1,    2.5, 5,    7.5, 10,  20, 40, 80};
const Buckets kLatency = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                          30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Buckets kChoices = {1, 2, 5, 10, 20};
const Buckets kHttp = {.1, .5, 1};
const Buckets kHttpFine = {.01, .025, .05, .075, .1,  .25, .5,  .75, 1,  1.5, 2,
                           2.5, 3,    3.5, 4,    4.5, 5,   7.5, 10,  30, 60};

// Under these further names the same values are exported.
const std::pair<const char*, const char*> kOldNames[] = {
    {"vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"},
    {"vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"},
    {"vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"},
    {"vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"},
};

Buckets OneTwoFive(int64_t max) {
  Buckets buckets;
  for (int64_t decade = 1; decade <= max; decade *= 10) {
    for (const int64_t step : {1, 2, 5}) {
      if (decade * step <= max) buckets.push_back(static_cast<double>(decade * step));
    }
  }
  return buckets;
}

std::string NumberText(double value) {
  if (std::isinf(value)) return value < 0 ? "-Inf" : "+Inf";
  return FloatText(value);
}

void AppendSample(std::string& out, const std::string& name, const std::vector<ClientMetric::Label>& labels,
                  const char* extra_name, const std::string& extra_value, double value) {
  out += name;
  std::string text;
  const auto add = [&text](const std::string& key, const std::string& label) {
    if (!text.empty()) text += ',';
    text += key + "=\"";
    for (char c : label) {
      if (c == '\n') {
        text += "\\n";
        continue;
      }
      if (c == '"' || c == '\\') text += '\\';
      text += c;
    }
    text += '"';
  };
  for (const auto& label : labels) add(label.name, label.value);
  if (extra_name) add(extra_name, extra_value);
  if (!text.empty()) out += '{' + text + '}';
  out += ' ' + NumberText(value) + '\n';
}

void AppendFamily(std::string& out, const MetricFamily& family) {
  const char* type = family.type == MetricType::Counter     ? "counter"
                     : family.type == MetricType::Gauge     ? "gauge"
                     : family.type == MetricType::Histogram ? "histogram"
                                                            : "summary";
  out += Format("# HELP {} {}\n# TYPE {} {}\n", family.name, family.help, family.name, type);
  for (const ClientMetric& metric : family.metric) {
    if (family.type == MetricType::Counter) {
      AppendSample(out, family.name, metric.label, nullptr, "", metric.counter.value);
    } else if (family.type == MetricType::Gauge) {
      AppendSample(out, family.name, metric.label, nullptr, "", metric.gauge.value);
    } else if (family.type == MetricType::Summary) {
      AppendSample(out, family.name + "_count", metric.label, nullptr, "",
                   static_cast<double>(metric.summary.sample_count));
      AppendSample(out, family.name + "_sum", metric.label, nullptr, "", metric.summary.sample_sum);
    } else {
      const auto& histogram = metric.histogram;
      for (const auto& bucket : histogram.bucket) {
        AppendSample(out, family.name + "_bucket", metric.label, "le", NumberText(bucket.upper_bound),
                     static_cast<double>(bucket.cumulative_count));
      }
      AppendSample(out, family.name + "_count", metric.label, nullptr, "",
                   static_cast<double>(histogram.sample_count));
      AppendSample(out, family.name + "_sum", metric.label, nullptr, "", histogram.sample_sum);
    }
  }
}

// Values read when the text is asked for.
class Snapshot {
 public:
  void Add(MetricType type, const std::string& name, const char* help, const Labels& labels, double value) {
    auto& family =
        families_.empty() || families_.back().name != name ? families_.emplace_back() : families_.back();
    family.name = name;
    family.help = help;
    family.type = type;
    ClientMetric& metric = family.metric.emplace_back();
    for (const auto& [key, label] : labels) metric.label.push_back({key, label});
    metric.counter.value = value;
    metric.gauge.value = value;
  }
  void Gauge(const std::string& name, const char* help, const Labels& labels, double value) {
    Add(MetricType::Gauge, name, help, labels, value);
  }
  void Counter(const std::string& name, const char* help, const Labels& labels, double value) {
    Add(MetricType::Counter, name, help, labels, value);
  }
  std::vector<MetricFamily>& families() { return families_; }

 private:
  std::vector<MetricFamily> families_;
};

int CountOpenFiles() {
  DIR* folder = ::opendir("/proc/self/fd");
  if (!folder) return 0;
  int count = -3;  // ".", ".." and the folder itself
  while (::readdir(folder)) ++count;
  ::closedir(folder);
  return count;
}

// Seconds since the epoch at which this process started.
double StartTime(const std::string& stat_tail) {
  // Field 22 is the start in clock ticks after boot; the tail begins with field 3.
  size_t at = 0;
  for (int field = 3; field < 22 && at != std::string::npos; ++field) at = stat_tail.find(' ', at + 1);
  if (at == std::string::npos) return 0;
  const double ticks = std::strtod(stat_tail.c_str() + at, nullptr);
  timespec boot{}, now{};
  ::clock_gettime(CLOCK_BOOTTIME, &boot);
  ::clock_gettime(CLOCK_REALTIME, &now);
  const auto seconds = [](const timespec& t) {
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  return seconds(now) - seconds(boot) + ticks / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

void AddProcess(Snapshot& snapshot) {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  rlimit files{};
  ::getrlimit(RLIMIT_NOFILE, &files);
  long virtual_pages = 0, resident_pages = 0;
  const std::string sizes = ReadFile("/proc/self/statm").value_or("");
  std::sscanf(sizes.c_str(), "%ld %ld", &virtual_pages, &resident_pages);
  const double page = static_cast<double>(::sysconf(_SC_PAGESIZE));
  const std::string stat = ReadFile("/proc/self/stat").value_or("");
  const size_t name_end = stat.rfind(") ");
  snapshot.Gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", {},
                 page * static_cast<double>(virtual_pages));
  snapshot.Gauge("process_resident_memory_bytes", "Resident memory size in bytes.", {},
                 page * static_cast<double>(resident_pages));
  snapshot.Gauge("process_start_time_seconds", "Start time of the process since the epoch in seconds.", {},
                 name_end == std::string::npos ? 0 : StartTime(stat.substr(name_end + 2)));
  snapshot.Counter("process_cpu_seconds_total", "User and system CPU time spent in seconds.", {},
                   seconds(usage.ru_utime) + seconds(usage.ru_stime));
  snapshot.Gauge("process_open_fds", "Number of open file descriptors.", {}, CountOpenFiles());
  snapshot.Gauge("process_max_fds", "Maximum number of open file descriptors.", {},
                 static_cast<double>(files.rlim_cur));
}

}  // namespace

struct Metrics::Content {
  explicit Content(const ApiOptions& the_options)
      : options(the_options),
        labels{{"model_name", the_options.model_names.empty() ? "" : the_options.model_names.front()},
               {"engine", "0"}} {}

  prometheus::Histogram& AddHistogram(const char* name, const char* help, const Buckets& buckets) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(labels, buckets);
  }
  void AddEngine(Snapshot& snapshot, const Live& live) const;

  const ApiOptions options;
  const Labels labels;
  prometheus::Registry registry;
  const Buckets sizes = OneTwoFive(options.max_model_len);
  prometheus::Histogram& prompt_tokens =
      AddHistogram("vllm:request_prompt_tokens", "Prompt tokens of a finished request.", sizes);
  prometheus::Histogram& generation_tokens =
      AddHistogram("vllm:request_generation_tokens", "Generated tokens of a finished request.", sizes);
  prometheus::Histogram& max_generation_tokens = AddHistogram(
      "vllm:request_max_num_generation_tokens", "Most tokens that an answer of a request got.", sizes);
  prometheus::Histogram& params_max_tokens =
      AddHistogram("vllm:request_params_max_tokens", "max_tokens of a request.", sizes);
  prometheus::Histogram& prefill_computed =
      AddHistogram("vllm:request_prefill_kv_computed_tokens",
                   "Prompt tokens computed, without those from the cache.", sizes);
  prometheus::Histogram& params_n = AddHistogram("vllm:request_params_n", "n of a request.", kChoices);
  prometheus::Histogram& iteration_tokens =
      AddHistogram("vllm:iteration_tokens_total", "Tokens of a step, prompt and generated.", kStepTokens);
  prometheus::Histogram& first_token =
      AddHistogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", kFirstToken);
  prometheus::Histogram& inter_token =
      AddHistogram("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", kInterToken);
  prometheus::Histogram& per_token = AddHistogram("vllm:request_time_per_output_token_seconds",
                                                  "Mean time between the tokens of an answer.", kInterToken);
  prometheus::Histogram& e2e =
      AddHistogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", kLatency);
  prometheus::Histogram& queue =
      AddHistogram("vllm:request_queue_time_seconds", "From arrival to the first step.", kLatency);
  prometheus::Histogram& inference =
      AddHistogram("vllm:request_inference_time_seconds", "From the first step to the last token.", kLatency);
  prometheus::Histogram& prefill =
      AddHistogram("vllm:request_prefill_time_seconds", "From the first step to the first token.", kLatency);
  prometheus::Histogram& decode =
      AddHistogram("vllm:request_decode_time_seconds", "From the first to the last token.", kLatency);
  prometheus::Family<prometheus::Counter>& success = prometheus::BuildCounter()
                                                         .Name("vllm:request_success_total")
                                                         .Help("Finished requests by reason.")
                                                         .Register(registry);
  prometheus::Family<prometheus::Counter>& http_requests = prometheus::BuildCounter()
                                                               .Name("http_requests_total")
                                                               .Help("HTTP requests by handler and status.")
                                                               .Register(registry);
  prometheus::Family<prometheus::Histogram>& http_duration =
      prometheus::BuildHistogram()
          .Name("http_request_duration_seconds")
          .Help("Duration of HTTP requests by handler.")
          .Register(registry);
  prometheus::Histogram& http_duration_fine = prometheus::BuildHistogram()
                                                  .Name("http_request_duration_highr_seconds")
                                                  .Help("Duration of HTTP requests.")
                                                  .Register(registry)
                                                  .Add({}, kHttpFine);
  prometheus::Family<prometheus::Summary>& http_request_size = prometheus::BuildSummary()
                                                                   .Name("http_request_size_bytes")
                                                                   .Help("Bytes of request bodies.")
                                                                   .Register(registry);
  prometheus::Family<prometheus::Summary>& http_response_size = prometheus::BuildSummary()
                                                                    .Name("http_response_size_bytes")
                                                                    .Help("Bytes of answers.")
                                                                    .Register(registry);
  int64_t local_tokens = 0, cached_tokens = 0, rejections = 0;
  TimeNs step_time = 0;  // of the step whose tokens are being added up
  int64_t step_tokens = 0;
};

Metrics::Metrics(const ApiOptions& options) : content_(std::make_unique<Content>(options)) {
  for (const char* reason : {"stop", "length", "abort", "error"}) {
    Labels labels = content_->labels;
    labels["finished_reason"] = reason;
    content_->success.Add(labels);
  }
}
Metrics::~Metrics() = default;

void Metrics::OnRequest(int num_choices, int64_t max_tokens) {
  content_->params_n.Observe(num_choices);
  content_->params_max_tokens.Observe(static_cast<double>(max_tokens));
}

void Metrics::OnStepTokens(TimeNs time, int64_t num_tokens) {
  if (time != content_->step_time) {
    if (content_->step_tokens > 0)
      content_->iteration_tokens.Observe(static_cast<double>(content_->step_tokens));
    content_->step_time = time;
    content_->step_tokens = 0;
  }
  content_->step_tokens += num_tokens;
}

void Metrics::OnFirstToken(TimeNs arrival, TimeNs time, int64_t prompt_tokens, int64_t cached_tokens) {
  content_->first_token.Observe(Seconds(time - arrival));
  content_->local_tokens += prompt_tokens - cached_tokens;
  content_->cached_tokens += cached_tokens;
}

void Metrics::OnNextToken(TimeNs since_last) {
  content_->inter_token.Observe(Seconds(since_last));
}

void Metrics::OnSequenceEnd(const SequenceRecord& record) {
  Content& content = *content_;
  Labels labels = content.labels;
  labels["finished_reason"] = record.finish;
  content.success.Add(labels).Increment();
  content.prompt_tokens.Observe(static_cast<double>(record.prompt_tokens));
  content.generation_tokens.Observe(static_cast<double>(record.generated_tokens));
  content.prefill_computed.Observe(static_cast<double>(record.prompt_tokens - record.cached_tokens));
  if (record.last_token == 0) return;
  content.e2e.Observe(Seconds(record.last_token - record.arrival));
  content.queue.Observe(Seconds(std::max<TimeNs>(record.first_scheduled - record.arrival, 0)));
  content.inference.Observe(Seconds(record.last_token - record.first_scheduled));
  content.prefill.Observe(Seconds(record.first_token - record.first_scheduled));
  content.decode.Observe(Seconds(record.last_token - record.first_token));
  if (record.generated_tokens > 1) {
    content.per_token.Observe(Seconds(record.last_token - record.first_token) /
                              static_cast<double>(record.generated_tokens - 1));
  }
}

void Metrics::OnRequestEnd(int64_t max_generated_tokens) {
  content_->max_generation_tokens.Observe(static_cast<double>(max_generated_tokens));
}

void Metrics::OnRejected() {
  ++content_->rejections;
}

void Metrics::OnHttp(const ExchangeRecord& record, const std::string& handler) {
  Content& content = *content_;
  static constexpr std::string_view kMethods[] = {"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"};
  const bool known = std::find(std::begin(kMethods), std::end(kMethods), record.method) != std::end(kMethods);
  // Names chosen by clients never become labels.
  const std::string method = known ? record.method : "none";
  content.http_requests
      .Add({{"handler", handler}, {"method", method}, {"status", Format("{}xx", record.status / 100)}})
      .Increment();
  content.http_duration.Add({{"handler", handler}, {"method", method}}, kHttp).Observe(record.seconds);
  content.http_duration_fine.Observe(record.seconds);
  const auto add_size = [&](prometheus::Family<prometheus::Summary>& family, size_t size) {
    family.Add({{"handler", handler}}, prometheus::Summary::Quantiles{}).Observe(static_cast<double>(size));
  };
  add_size(content.http_request_size, record.request_bytes);
  add_size(content.http_response_size, record.response_bytes);
}

void Metrics::Content::AddEngine(Snapshot& snapshot, const Live& live) const {
  const EngineStats& engine = live.engine;
  const auto count = [](auto value) { return static_cast<double>(value); };
  // One sample per data-parallel group, all samples of a name together.
  const auto each_group = [&](MetricType type, const char* name, const char* help, const auto& value) {
    for (size_t group = 0; group < engine.groups.size(); ++group) {
      Labels of_group = labels;
      of_group["engine"] = std::to_string(group);
      snapshot.Add(type, name, help, of_group, value(engine.groups[group]));
    }
  };
  const auto gauge = [&](const char* name, const char* help, const auto& value) {
    each_group(MetricType::Gauge, name, help, value);
  };
  const auto counter = [&](const char* name, const char* help, auto member) {
    each_group(MetricType::Counter, name, help,
               [&](const GroupStats& group) { return count(group.*member); });
  };
  gauge("vllm:num_requests_running", "Sequences in the running batch.",
        [&](const GroupStats& group) { return count(group.num_running); });
  gauge("vllm:num_requests_waiting", "Sequences that wait.",
        [&](const GroupStats& group) { return count(group.num_waiting); });
  gauge("vllm:kv_cache_usage_perc", "Used share of the cache, 0 to 1.", [&](const GroupStats& group) {
    return group.num_blocks > 0 ? count(group.num_blocks_used) / count(group.num_blocks) : 0.0;
  });
  counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.",
          &GroupStats::prefix_queries);
  counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.",
          &GroupStats::prefix_hits);
  counter("vllm:num_preemptions_total", "Preemptions.", &GroupStats::num_preemptions);
  counter("vllm:prompt_tokens_total", "Prompt tokens processed.", &GroupStats::prompt_tokens);
  counter("vllm:generation_tokens_total", "Tokens generated.", &GroupStats::generation_tokens);
  snapshot.Counter("vllm:prompt_tokens_cached_total", "Prompt tokens taken from the cache.", labels,
                   count(cached_tokens));
  const std::pair<const char*, int64_t> sources[] = {
      {"local_compute", local_tokens}, {"local_cache_hit", cached_tokens}, {"external_kv_transfer", 0}};
  for (const auto& [source, tokens] : sources) {
    Labels by_source = labels;
    by_source["source"] = source;
    snapshot.Counter("vllm:prompt_tokens_by_source_total", "Prompt tokens by where they came from.",
                     by_source, count(tokens));
  }
  snapshot.Counter("vllm:admission_rejections_total", "Requests refused because the queue was full.", labels,
                   count(rejections));
  snapshot.Gauge("vllm:cache_config_info", "Settings of the cache.",
                 {{"engine", "0"},
                  {"block_size", std::to_string(options.block_size)},
                  {"num_gpu_blocks", std::to_string(options.num_blocks)}},
                 1);
  snapshot.Counter("tessera:steps_total", "Steps of the engine.", labels, count(engine.num_steps));
  if (engine.last_step_end > 0) {
    snapshot.Gauge("tessera:last_step_age_seconds", "Time since the last step ended.", labels,
                   Seconds(live.now - engine.last_step_end));
  }
  snapshot.Gauge("tessera:draining", "1 while no new requests are taken.", labels, live.draining ? 1 : 0);
  snapshot.Gauge("tessera:healthy", "1 while steps can run.", labels, live.healthy ? 1 : 0);
}

namespace {

void AddRanks(Snapshot& snapshot, const std::vector<RankStatus>& ranks) {
  const auto text = [](int number) { return std::to_string(number); };
  for (const RankStatus& rank : ranks) {
    snapshot.Gauge("tessera:rank_up", "1 while the rank lives.",
                   {{"rank", text(rank.rank)},
                    {"dp", text(rank.dp)},
                    {"tp", text(rank.tp)},
                    {"ep", text(rank.ep)},
                    {"pid", text(rank.process)},
                    {"node", rank.node}},
                   rank.up ? 1 : 0);
  }
  for (const RankStatus& rank : ranks) {
    snapshot.Gauge("tessera:rank_weight_bytes", "Bytes of packed weights.", {{"rank", text(rank.rank)}},
                   static_cast<double>(rank.weight_bytes));
  }
  using Exchange = RankStatus::Exchange;
  const auto each_exchange = [&](const char* name, const char* help, uint64_t Exchange::* member) {
    for (const RankStatus& rank : ranks) {
      for (const Exchange& exchange : rank.exchanges) {
        snapshot.Counter(name, help, {{"rank", text(rank.rank)}, {"collective", exchange.collective}},
                         static_cast<double>(exchange.*member));
      }
    }
  };
  each_exchange("tessera:collective_calls_total", "Exchanges between ranks.", &Exchange::calls);
  each_exchange("tessera:collective_bytes_total", "Bytes handed to other ranks.", &Exchange::bytes);
  each_exchange("tessera:collective_wire_bytes_total", "Of them, bytes sent to other hosts, packed.",
                &Exchange::wire_bytes);
}

}  // namespace

std::string Metrics::Text(const Live& live) {
  OnStepTokens(0, 0);  // the last step is complete, or its other events count as another one
  Snapshot snapshot;
  content_->AddEngine(snapshot, live);
  AddRanks(snapshot, live.ranks);
  AddProcess(snapshot);
  std::vector<MetricFamily> families = content_->registry.Collect();
  for (MetricFamily& family : snapshot.families()) families.push_back(std::move(family));
  std::string text;
  for (MetricFamily& family : families) {
    AppendFamily(text, family);
    for (const auto& [name, old_name] : kOldNames) {
      if (family.name != name) continue;
      family.name = old_name;
      AppendFamily(text, family);
      break;
    }
  }
  return text;
}

}  // namespace tessera
