// Puts the server, the routes and the shared state together. See api.h.
#include "http/api.h"

#include <ctime>

#include "base/log.h"
#include "http/handlers.h"
#include "http/service.h"

namespace tessera {

struct ApiServer::Content {
  Content(const ApiOptions& options, const ApiModel& model, std::unique_ptr<HttpServer> the_server)
      : server(std::move(the_server)),
        service{.options = options,
                .model = model,
                .server = *server,
                .metrics = Metrics(options),
                .news = NewsList::Create(*server),
                .key_digests = Digests(options.api_keys),
                .max_token_bytes = LongestTokenBytes(model.tokenizer),
                .start_time = static_cast<int64_t>(std::time(nullptr))} {}

  static std::vector<Sha256> Digests(const std::vector<std::string>& keys) {
    std::vector<Sha256> digests;
    for (const std::string& key : keys)
      digests.push_back(HashSha256(std::as_bytes(std::span(key.data(), key.size()))));
    return digests;
  }

  std::unique_ptr<HttpServer> server;
  Service service;
  bool stopped = false;
};

ApiServer::ApiServer(std::unique_ptr<Content> content) : content_(std::move(content)) {}

ApiServer::~ApiServer() {
  Stop(std::chrono::nanoseconds(0));
}

Result<std::unique_ptr<ApiServer>> ApiServer::Start(const ApiOptions& options, const ApiModel& model) {
  ServerOptions server_options;
  server_options.host = options.host;
  server_options.port = options.port;
  server_options.limits.max_body_bytes = options.max_body_bytes;
  ASSIGN_OR_RETURN(auto server, HttpServer::Listen(server_options));
  auto content = std::make_unique<Content>(options, model, std::move(server));
  Service& service = content->service;
  content->server->Start({
      .admit = [&service](const HttpRequest& request) { return Admit(service, request); },
      .handle =
          [&service](HttpRequest request, std::shared_ptr<Exchange> exchange) {
            Dispatch(service, std::move(request), std::move(exchange));
          },
      .refuse = RefuseHttp,
      .finished =
          [&service](const ExchangeRecord& record) {
            service.metrics.OnHttp(record, RouteLabel(record.path));
          },
  });
  return std::unique_ptr<ApiServer>(new ApiServer(std::move(content)));
}

int ApiServer::port() const {
  return content_->server->port();
}

void ApiServer::BeginDrain() {
  content_->service.draining = true;
}

void ApiServer::Stop(std::chrono::nanoseconds limit) {
  if (std::exchange(content_->stopped, true)) return;
  BeginDrain();
  if (!content_->server->WaitUntilIdle(limit) && limit.count() > 0) {
    LogWarning("requests were still open when the server stopped; their connections are closed");
  }
  content_->server->Stop();
  content_->service.news->Close();
}

}  // namespace tessera
