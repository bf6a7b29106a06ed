// The composition of the server, read from the bottom: RunServe, Serve, and what they need.
#include "cli/serve.h"

#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "base/file.h"
#include "base/format.h"
#include "base/log.h"
#include "base/memory.h"
#include "cli/assembly.h"
#include "cli/json.h"
#include "cli/options.h"
#include "cli/parallel.h"
#include "cli/signals.h"
#include "cluster/node.h"
#include "http/api.h"

namespace tessera::cli {
namespace {

using std::chrono::milliseconds;
constexpr milliseconds kLogInterval{5000};
constexpr std::chrono::seconds kCloseLimit{5};  // for answers that are ready, after the engine has drained

// Every open stream is a descriptor.
void RaiseFileLimit() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

// Loading a large model takes minutes: a port in use is said before, not after.
Status ProbePort(const std::string& host, int64_t port) {
  if (port == 0) return {};
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found); error != 0) {
    return Invalid("--host: '{}' is not an address: {}", host, gai_strerror(error));
  }
  const int descriptor = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  const bool bound = bind(descriptor, found->ai_addr, found->ai_addrlen) == 0 && listen(descriptor, 1) == 0;
  const int reason = errno;
  freeaddrinfo(found);
  close(descriptor);
  if (bound) return {};
  return Fail(ErrorKind::kUnavailable, "{}:{}: {}; choose another --port", host, port, std::strerror(reason));
}

Result<std::unique_ptr<ChatTemplate>> LoadChatTemplate(const ServeOptions& options,
                                                       const Tokenizer& tokenizer) {
  std::string source = options.chat_template;
  const std::string beside = options.engine.model + "/chat_template.jinja";
  if (source.empty()) {
    source = tokenizer.chat_template();
    if (source.empty() && FileExists(beside)) {
      ASSIGN_OR_RETURN(source, ReadFile(beside));
    }
    if (source.empty()) return nullptr;
  } else if (FileExists(source)) {
    ASSIGN_OR_RETURN(source, ReadFile(options.chat_template));
  } else if (source.find('{') == std::string::npos) {
    return Invalid("--chat-template: '{}' is neither a file nor a template", source);
  }
  auto compiled = ChatTemplate::Compile(source, tokenizer);
  if (!compiled) {
    return Invalid("{}: {}",
                   options.chat_template.empty() ? "the checkpoint's chat template" : "--chat-template",
                   compiled.error().message);
  }
  return compiled;
}

// generation_config.json, then --override-generation-config, over the built-in values.
Result<DefaultSampling> LoadSampling(const EngineFlags& flags, std::vector<int32_t>* eos_ids) {
  GenerationDefaults file;
  if (flags.generation_config != "vllm") {
    const std::string folder = flags.generation_config == "auto" ? flags.model : flags.generation_config;
    if (flags.generation_config != "auto" && !FileExists(folder + "/generation_config.json")) {
      return Invalid("--generation-config: '{}' has no generation_config.json; wanted auto, vllm or a folder",
                     folder);
    }
    ASSIGN_OR_RETURN(file, LoadGenerationDefaults(folder));
  }
  if (!file.eos_token_ids.empty()) *eos_ids = file.eos_token_ids;
  const auto pick = [&](const char* key, auto from_file, auto built_in) -> decltype(built_in) {
    if (const auto value = JsonNumber(flags.override_generation_config, Format("/{}", key))) return *value;
    return from_file ? *from_file : built_in;
  };
  return DefaultSampling{.temperature = pick("temperature", file.temperature, 1.0),
                         .top_p = pick("top_p", file.top_p, 1.0),
                         .top_k = pick("top_k", file.top_k, 0),
                         .min_p = pick("min_p", file.min_p, 0.0),
                         .repetition_penalty = pick("repetition_penalty", file.repetition_penalty, 1.0),
                         .max_new_tokens = pick("max_new_tokens", file.max_new_tokens, 0)};
}

bool WantsReasoning(const ServeOptions& options, const Tokenizer& tokenizer) {
  if (options.reasoning_parser != "auto") return options.reasoning_parser == "deepseek_r1";
  return tokenizer.TokenId("<think>") && tokenizer.TokenId("</think>");
}

Result<ApiOptions> MakeApiOptions(const ServeOptions& o, const Assembly& assembly) {
  ApiOptions api{.host = o.host,
                 .port = static_cast<int>(o.port),
                 .model_names = o.served_model_name,
                 .model_root = o.engine.model,
                 .api_keys = o.api_key,
                 .version = TESSERA_VERSION,
                 .numerics = std::string(kernels::kNumerics),
                 .sampling = {},
                 .eos_ids = assembly.config.eos_token_ids,
                 .max_model_len = assembly.max_model_len,
                 .max_logprobs = static_cast<int>(o.max_logprobs),
                 .reasoning_parser = WantsReasoning(o, *assembly.tokenizer),
                 .response_role = o.response_role,
                 .default_chat_template_kwargs = o.default_chat_template_kwargs,
                 .enable_prompt_tokens_details = o.enable_prompt_tokens_details,
                 .enable_force_include_usage = o.enable_force_include_usage,
                 .enable_request_id_headers = o.enable_request_id_headers,
                 .enable_server_load_tracking = o.enable_server_load_tracking,
                 .enable_tokenizer_info_endpoint = o.enable_tokenizer_info_endpoint,
                 .max_body_bytes = static_cast<size_t>(o.max_body_bytes),
                 .block_size = static_cast<int>(o.engine.block_size),
                 .num_blocks = assembly.cache.num_blocks};
  if (api.model_names.empty()) api.model_names.push_back(o.engine.model);
  ASSIGN_OR_RETURN(api.sampling, LoadSampling(o.engine, &api.eos_ids));
  const auto eos = assembly.tokenizer->eos_id();
  if (eos && std::find(api.eos_ids.begin(), api.eos_ids.end(), *eos) == api.eos_ids.end())
    api.eos_ids.push_back(*eos);
  return api;
}

void LogStart(const ServeOptions& o, const ApiOptions& api, const Assembly& a, int port) {
  for (const std::string& line : a.lines) LogInfo("{}", line);
  LogInfo("served as {}", fmt::join(api.model_names, ", "));
  LogInfo("cache of {} blocks of {} tokens ({}, touched as needed){}; {} tokens per request",
          a.cache.num_blocks, o.engine.block_size, BytesText(a.cache.total_bytes()),
          a.plan.degrees.dp > 1 ? " in each data-parallel group" : "", a.max_model_len);
  const bool everywhere = o.host == "0.0.0.0" || o.host == "::";
  const std::string host = everywhere                              ? "127.0.0.1"
                           : o.host.find(':') != std::string::npos ? "[" + o.host + "]"
                                                                   : o.host;
  LogInfo(
      "open on {} ({}, {}): /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /health, /metrics",
      Format("http://{}:{}", host, port), everywhere ? "all interfaces" : "this address only",
      api.api_keys.empty() ? "no API key" : "API key needed");
  const std::string key = api.api_keys.empty() ? "" : " -H 'Authorization: Bearer YOUR_KEY'";
  fmt::print(
      "Ready. Try:\n  curl http://{}:{}/v1/completions -H 'Content-Type: application/json'{} -d "
      "'{{\"model\": {}, \"prompt\": \"I am\", \"max_tokens\": 20, \"temperature\": 0}}'\n",
      host, port, key, JsonQuote(api.model_names[0]));
  std::fflush(stdout);
}

// One line per interval in which something happened.
class StatsLog {
 public:
  explicit StatsLog(const Engine& engine) : engine_(engine), last_(engine.Stats()) {}
  void Write() {
    const EngineStats now = engine_.Stats();
    const double seconds = kLogInterval.count() / 1000.0;
    const uint64_t prompt = now.prompt_tokens - last_.prompt_tokens;
    const uint64_t generated = now.generation_tokens - last_.generation_tokens;
    const uint64_t queries = now.prefix_queries - last_.prefix_queries;
    if (prompt + generated > 0 || now.num_running + now.num_waiting > 0) {
      LogInfo(
          "prompt {:.1f} tokens/s, generation {:.1f} tokens/s, running {}, waiting {}, cache {:.1f} %, "
          "prefix hits {:.1f} %",
          prompt / seconds, generated / seconds, now.num_running, now.num_waiting,
          100.0 * now.num_blocks_used / now.num_blocks,
          queries == 0 ? 0.0 : 100.0 * (now.prefix_hits - last_.prefix_hits) / queries);
    }
    last_ = now;
  }

 private:
  const Engine& engine_;
  EngineStats last_;
};

LogLevel LevelOf(const std::string& name) {
  if (name == "debug") return LogLevel::kDebug;
  if (name == "warning") return LogLevel::kWarning;
  return name == "error" ? LogLevel::kError : LogLevel::kInfo;
}

// TESSERA_LIFELINE: a descriptor that closes when whoever started this process has ended; -1 where unset.
int Lifeline() {
  const char* text = std::getenv("TESSERA_LIFELINE");
  const int descriptor = text == nullptr ? -1 : std::atoi(text);
  if (descriptor <= STDERR_FILENO) return -1;
  fcntl(descriptor, F_SETFD, FD_CLOEXEC);
  return descriptor;
}

bool IsCut(int lifeline) {
  pollfd wait = {.fd = lifeline, .events = 0, .revents = 0};
  return lifeline >= 0 && poll(&wait, 1, 0) > 0;
}

// A host that only lends its hands.
Status ServeHeadless(const ServeOptions& options, const ModelConfig& config, const ParallelPlan& plan,
                     SignalWatch& signals) {
  ASSIGN_OR_RETURN(const int max_model_len, MaxModelLen(options.engine, config));
  ASSIGN_OR_RETURN(const Agreement agreement, MakeAgreement(options.engine, plan, max_model_len));
  const NodeOptions node{.head = plan.control,
                         .source = plan.source_address,
                         .secret = plan.secret,
                         .degrees = plan.degrees,
                         .ranks = plan.local,
                         .agreement = agreement,
                         .model = options.engine.model,
                         .data_address = plan.data_address,
                         .isa = ForcedIsa(),
                         .threads = static_cast<int>(options.engine.threads),
                         .decode_threads = static_cast<int>(options.engine.decode_threads)};
  signals.Arm();
  return RunNode(node,
                 [&, lifeline = Lifeline()] { return signals.Wait(milliseconds(0)) || IsCut(lifeline); });
}

Status Serve(const ServeOptions& options, const ModelConfig& config, const ParallelPlan& plan,
             SignalWatch& signals) {
  if (plan.headless) return ServeHeadless(options, config, plan, signals);
  RETURN_IF_ERROR(ProbePort(options.host, options.port));
  // Ranks are processes: a signal while they start must end them in order.
  if (plan.processes) signals.Arm();
  const Assembly::Wishes wishes{
      .max_queued_requests = options.max_num_queued_reqs,
      .exchange_limit = std::chrono::seconds(options.parallel.distributed_timeout_seconds),
      .log_level = LevelOf(options.log_level),
      .cancelled = [&] { return plan.processes && signals.Wait(milliseconds(0)); }};
  ASSIGN_OR_RETURN(const std::unique_ptr<Assembly> assembly,
                   Assembly::Build(options.engine, config, plan, wishes));
  ASSIGN_OR_RETURN(const std::unique_ptr<ChatTemplate> chat_template,
                   LoadChatTemplate(options, *assembly->tokenizer));
  ASSIGN_OR_RETURN(const ApiOptions api, MakeApiOptions(options, *assembly));
  Engine& engine = *assembly->engine;
  ASSIGN_OR_RETURN(
      const std::unique_ptr<ApiServer> server,
      ApiServer::Start(api, {engine, *assembly->tokenizer, chat_template.get(), assembly->clock}));
  LogStart(options, api, *assembly, server->port());
  signals.Arm();
  StatsLog stats(engine);
  auto next_line = std::chrono::steady_clock::now() + kLogInterval;
  while (!signals.Wait(milliseconds(500)) && engine.healthy()) {
    if (options.disable_log_stats || std::chrono::steady_clock::now() < next_line) continue;
    stats.Write();
    next_line += kLogInterval;
  }
  server->BeginDrain();
  if (engine.healthy()) {
    const EngineStats now = engine.Stats();
    LogInfo("draining: {} running and {} waiting get {} s; a second signal ends at once", now.num_running,
            now.num_waiting, options.shutdown_timeout_s);
    engine.Drain(std::chrono::nanoseconds(static_cast<int64_t>(options.shutdown_timeout_s * 1e9)));
  }
  server->Stop(kCloseLimit);
  if (!engine.healthy()) return std::unexpected(engine.fatal_error());  // perhaps while it drained
  LogInfo("drained");
  return {};
}

}  // namespace

int RunServe(std::span<const std::string> arguments) {
  const Variable variable = [](const char* name) -> const char* { return std::getenv(name); };
  const auto parsed = ParseServe(arguments, variable);
  if (!parsed) {
    fmt::print(stderr, "tessera serve: {}\n", parsed.error().message);
    return 2;
  }
  if (parsed->help) {
    fmt::print("{}", parsed->help_text);
    return 0;
  }
  SignalWatch signals;
  std::signal(SIGPIPE, SIG_IGN);
  RaiseFileLimit();
  SetLogLevel(LevelOf(parsed->options.log_level));
  for (const std::string& note : parsed->notes) LogInfo("{}", note);
  for (const std::string& warning : parsed->warnings) LogWarning("{}", warning);
  const auto config = LoadModelConfig(parsed->options.engine.model);
  if (!config) {
    LogError("{}", config.error().message);
    return 1;
  }
  const auto plan = PlanParallel(parsed->options, *config, variable);
  if (!plan) {
    fmt::print(stderr, "tessera serve: {}\n", plan.error().message);
    return 2;
  }
  for (const std::string& note : plan->notes) LogInfo("{}", note);
  for (const std::string& warning : plan->warnings) LogWarning("{}", warning);
  if (const Status status = Serve(parsed->options, *config, *plan, signals); !status) {
    LogError("{}", status.error().message);
    return 1;
  }
  return 0;
}

}  // namespace tessera::cli
