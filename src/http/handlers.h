// All routes of the API in one table, and who may use them. Read in order: admission, dispatch, small
// endpoints. Generation is in generation.cc.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "http/service.h"

namespace tessera {

// Decides on a request by its header alone: key, route, method, content type, readiness.
std::optional<HttpResponse> Admit(const Service& service, const HttpRequest& request);

// Answers an admitted request, at once or later.
void Dispatch(Service& service, HttpRequest request, std::shared_ptr<Exchange> exchange);

// The label of a path in metrics: a route of ours, else "none".
std::string RouteLabel(std::string_view path);

// The answer to bytes that are no acceptable HTTP.
HttpResponse RefuseHttp(int status, const std::string& reason);

}  // namespace tessera
