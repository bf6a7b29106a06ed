// See handlers.h.
#include "http/handlers.h"

#include <algorithm>

#include "http/generation.h"

namespace tessera {
namespace {

using ExchangePtr = std::shared_ptr<Exchange>;
using Handler = void (*)(Service&, HttpRequest, ExchangePtr);

constexpr TimeNs kStuckStep = 60'000'000'000;  // a step that takes longer than this: not ready

enum class Access { kOpen, kKey };  // kKey: needs an API key, if there are any

void AnswerJson(const Service& service, const HttpRequest& request, Exchange& exchange,
                HttpResponse response) {
  if (service.options.enable_request_id_headers) {
    response.headers.emplace_back("X-Request-Id", ChooseRequestId(request.Header("x-request-id"), ""));
  }
  exchange.Answer(std::move(response));
}

void Health(Service& service, HttpRequest request, ExchangePtr exchange) {
  AnswerJson(service, request, *exchange, {.status = service.model.engine.healthy() ? 200 : 503});
}

void Ready(Service& service, HttpRequest request, ExchangePtr exchange) {
  const EngineStats stats = service.model.engine.Stats();
  std::string why;
  if (!service.model.engine.healthy()) {
    why = "the engine stopped: " + service.model.engine.fatal_error().message;
  } else if (service.draining) {
    why = "the server is shutting down";
  } else if (stats.num_running > 0 && stats.last_step_end > 0 &&
             service.model.clock.Now() - stats.last_step_end > kStuckStep) {
    why = "no step has ended for a minute";
  }
  if (why.empty()) return AnswerJson(service, request, *exchange, {.body = "{\"ready\":true}"});
  AnswerJson(
      service, request, *exchange,
      ErrorResponse({.status = 503, .type = "ServiceUnavailableError", .message = why, .retry_after_s = 5}));
}

void Version(Service& service, HttpRequest request, ExchangePtr exchange) {
  std::string body = "{\"version\":";
  AppendJsonString(body, service.options.version);
  body += ",\"numerics\":";
  AppendJsonString(body, service.options.numerics);
  AnswerJson(service, request, *exchange, {.body = body + "}"});
}

void Load(Service& service, HttpRequest request, ExchangePtr exchange) {
  const int load = service.options.enable_server_load_tracking ? service.load : 0;
  AnswerJson(service, request, *exchange, {.body = Format("{{\"server_load\":{}}}", load)});
}

void MetricsText(Service& service, HttpRequest request, ExchangePtr exchange) {
  const Metrics::Live live{.engine = service.model.engine.Stats(),
                           .ranks = service.model.engine.Ranks(),
                           .now = service.model.clock.Now(),
                           .draining = service.draining,
                           .healthy = service.model.engine.healthy()};
  AnswerJson(
      service, request, *exchange,
      {.body = service.metrics.Text(live), .content_type = "text/plain; version=0.0.4; charset=utf-8"});
}

void Models(Service& service, HttpRequest request, ExchangePtr exchange) {
  std::string body = "{\"object\":\"list\",\"data\":[";
  const auto& names = service.options.model_names;
  for (size_t i = 0; i < names.size(); ++i) {
    // A name may be given twice; it is one model.
    if (std::find(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(i), names[i]) !=
        names.begin() + static_cast<std::ptrdiff_t>(i)) {
      continue;
    }
    if (i > 0) body += ',';
    body += "{\"id\":";
    AppendJsonString(body, names[i]);
    body +=
        Format(",\"object\":\"model\",\"created\":{},\"owned_by\":\"vllm\",\"root\":", service.start_time);
    AppendJsonString(body, service.options.model_root);
    body += ",\"numerics\":";
    AppendJsonString(body, service.options.numerics);
    body += Format(
        ",\"parent\":null,\"max_model_len\":{},\"permission\":[{{\"id\":\"modelperm-{:016x}\",\"object\":"
        "\"model_permission\",\"created\":{},\"allow_create_engine\":false,\"allow_sampling\":true,"
        "\"allow_logprobs\":true,\"allow_search_indices\":false,\"allow_view\":true,"
        "\"allow_fine_tuning\":false,\"organization\":\"*\",\"group\":null,\"is_blocking\":false}}]}}",
        service.options.max_model_len, i, service.start_time);
  }
  AnswerJson(service, request, *exchange, {.body = body + "]}"});
}

// Runs `work` on a background thread and answers with what it returns. `work` may use the service's immutable
// parts.
void AnswerFromBackground(Service& service, HttpRequest request, ExchangePtr exchange,
                          HttpResponse (*work)(const Service&, const HttpRequest&)) {
  service.server.RunInBackground([&service, work, exchange, request = std::move(request)]() mutable {
    auto response = std::make_shared<HttpResponse>(work(service, request));
    request.body.clear();
    service.server.Post([&service, exchange, response, request = std::move(request)] {
      AnswerJson(service, request, *exchange, std::move(*response));
    });
  });
}

void Tokenize(Service& service, HttpRequest request, ExchangePtr exchange) {
  AnswerFromBackground(
      service, std::move(request), std::move(exchange),
      [](const Service& s, const HttpRequest& http) -> HttpResponse {
        const auto body = ParseBody(http.body);
        if (!body) return ErrorResponse(body.error());
        const auto call = ParseTokenizeCall(*body, s.call_rules());
        if (!call) return ErrorResponse(call.error());
        ApiResult<TokenIds> ids;
        if (call->is_chat) {
          ids = RenderChat(call->chat, call->add_special_tokens, s.prompt_rules());
        } else if (auto encoded = s.model.tokenizer.EncodePrompt(call->prompt, call->add_special_tokens);
                   encoded) {
          ids = std::move(*encoded);
        } else {
          ids = std::unexpected(FromError(encoded.error()));
        }
        if (!ids) return ErrorResponse(ids.error());
        std::string out =
            Format("{{\"count\":{},\"max_model_len\":{},\"tokens\":", ids->size(), s.options.max_model_len);
        AppendJsonIds(out, *ids);
        out += ",\"token_strs\":";
        if (!call->return_token_strs) return {.body = out + "null}"};
        out += '[';
        for (size_t i = 0; i < ids->size(); ++i) {
          if (i > 0) out += ',';
          AppendJsonString(out, RepairUtf8(s.model.tokenizer.TokenBytes((*ids)[i])));
        }
        return {.body = out + "]}"};
      });
}

void Detokenize(Service& service, HttpRequest request, ExchangePtr exchange) {
  AnswerFromBackground(service, std::move(request), std::move(exchange),
                       [](const Service& s, const HttpRequest& http) -> HttpResponse {
                         const auto body = ParseBody(http.body);
                         if (!body) return ErrorResponse(body.error());
                         const auto ids = ParseDetokenizeCall(*body, s.call_rules());
                         if (!ids) return ErrorResponse(ids.error());
                         std::string out = "{\"prompt\":";
                         AppendJsonString(out, s.model.tokenizer.Decode(*ids, /*skip_special_tokens=*/false));
                         return {.body = out + "}"};
                       });
}

void TokenizerInfo(Service& service, HttpRequest request, ExchangePtr exchange) {
  const Tokenizer& tokenizer = service.model.tokenizer;
  if (!service.options.enable_tokenizer_info_endpoint) {
    return exchange->Answer(
        ErrorResponse({.status = 404,
                       .type = "NotFoundError",
                       .message = "/tokenizer_info needs --enable-tokenizer-info-endpoint"}));
  }
  std::string body = "{\"tokenizer_class\":\"PreTrainedTokenizerFast\",\"bos_token\":";
  AppendJsonString(body, tokenizer.bos_token());
  body += ",\"eos_token\":";
  AppendJsonString(body, tokenizer.eos_token());
  body += Format(",\"add_bos_token\":{},\"vocab_size\":{},\"model_max_length\":{},\"chat_template\":",
                 tokenizer.add_bos(), tokenizer.vocab_size(), service.options.max_model_len);
  AppendJsonString(body, tokenizer.chat_template());
  AnswerJson(service, request, *exchange, {.body = body + "}"});
}

void Completions(Service& service, HttpRequest request, ExchangePtr exchange) {
  Generation::Start(service, CallKind::kCompletion, std::move(request), std::move(exchange));
}

void ChatCompletions(Service& service, HttpRequest request, ExchangePtr exchange) {
  Generation::Start(service, CallKind::kChat, std::move(request), std::move(exchange));
}

struct Route {
  std::string_view path;
  std::string_view methods;  // as in the header Allow
  Access access;
  bool generates;  // refused while draining
  Handler handler;
};

constexpr Route kRoutes[] = {
    {"/v1/completions", "POST", Access::kKey, true, Completions},
    {"/v1/chat/completions", "POST", Access::kKey, true, ChatCompletions},
    {"/v1/models", "GET", Access::kKey, false, Models},
    {"/tokenize", "POST", Access::kKey, false, Tokenize},
    {"/detokenize", "POST", Access::kKey, false, Detokenize},
    {"/tokenizer_info", "GET", Access::kKey, false, TokenizerInfo},
    {"/health", "GET", Access::kOpen, false, Health},
    {"/ping", "GET, POST", Access::kOpen, false, Health},
    {"/ready", "GET", Access::kOpen, false, Ready},
    {"/version", "GET", Access::kKey, false, Version},
    {"/metrics", "GET", Access::kOpen, false, MetricsText},
    {"/load", "GET", Access::kKey, false, Load},
};

const Route* FindRoute(std::string_view path) {
  const auto found = std::find_if(std::begin(kRoutes), std::end(kRoutes),
                                  [&](const Route& route) { return route.path == path; });
  return found == std::end(kRoutes) ? nullptr : found;
}

bool HasKey(const Service& service, std::string_view authorization) {
  const size_t space = authorization.find(' ');
  if (space == std::string_view::npos) return false;
  std::string scheme(authorization.substr(0, space));
  std::transform(scheme.begin(), scheme.end(), scheme.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; });
  if (scheme != "bearer") return false;
  authorization.remove_prefix(std::min(authorization.find_first_not_of(' ', space), authorization.size()));
  const Sha256 digest = HashSha256(std::as_bytes(std::span(authorization.data(), authorization.size())));
  bool found = false;
  for (const Sha256& key : service.key_digests)
    found |= EqualConstantTime(digest, key);  // all of them, always
  return found;
}

bool IsJson(std::string_view content_type) {
  std::string type(content_type.substr(0, content_type.find(';')));
  while (!type.empty() && (type.back() == ' ' || type.back() == '\t')) type.pop_back();
  std::transform(type.begin(), type.end(), type.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; });
  return type == "application/json";
}

}  // namespace

std::optional<HttpResponse> Admit(const Service& service, const HttpRequest& request) {
  const Route* route = FindRoute(request.path);
  const bool guarded = !route || route->access == Access::kKey;
  if (guarded && !service.key_digests.empty() && request.method != "OPTIONS" &&
      !HasKey(service, request.Header("authorization"))) {
    return ErrorResponse({.status = 401,
                          .type = "AuthenticationError",
                          .message =
                              "Unauthorized: a valid API key is wanted in the header \"Authorization: Bearer "
                              "KEY\"."});
  }
  if (!route) {
    return ErrorResponse(
        {.status = 404,
         .type = "NotFoundError",
         .message = Format("Not Found: there is no {}", RepairUtf8(request.path.substr(0, 200)))});
  }
  const bool allowed =
      request.method == route->methods ||
      (route->methods == "GET, POST" && (request.method == "GET" || request.method == "POST"));
  if (!allowed) {
    HttpResponse response =
        ErrorResponse({.status = 405,
                       .type = "MethodNotAllowed",
                       .message = Format("Method Not Allowed: {} takes {}", route->path, route->methods)});
    response.headers.emplace_back("Allow", route->methods);
    return response;
  }
  if (route->methods == "POST" && !IsJson(request.Header("content-type"))) {
    return ErrorResponse({.type = "Bad Request",
                          .message = "Unsupported Media Type: Only 'application/json' is allowed",
                          .param = "header.content-type"});
  }
  if (route->generates && service.draining) {
    return ErrorResponse({.status = 503,
                          .type = "ServiceUnavailableError",
                          .message = "the server is shutting down",
                          .retry_after_s = 5});
  }
  return std::nullopt;
}

void Dispatch(Service& service, HttpRequest request, std::shared_ptr<Exchange> exchange) {
  FindRoute(request.path)->handler(service, std::move(request), std::move(exchange));
}

std::string RouteLabel(std::string_view path) {
  const Route* route = FindRoute(path);
  return route ? std::string(route->path) : "none";
}

HttpResponse RefuseHttp(int status, const std::string& reason) {
  if (status == 503) {
    return ErrorResponse(
        {.status = 503, .type = "ServiceUnavailableError", .message = reason, .retry_after_s = 1});
  }
  const char* type = status == 413   ? "RequestEntityTooLarge"
                     : status == 408 ? "RequestTimeout"
                                     : "Bad Request";
  return ErrorResponse({.status = status, .type = type, .message = reason});
}

}  // namespace tessera
