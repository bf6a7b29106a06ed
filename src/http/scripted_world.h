// For tests of the API: a real server and a real engine over an executor that emits scripted tokens, and a
// plain socket as the client. No model: texts are what the script says.
#pragma once

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "engine/engine.h"
#include "http/api.h"

namespace tessera::test {

// Draws the next token of the script that belongs to the sequence's seed; without one it repeats script 0.
class ScriptedExecutor : public Executor {
 public:
  Result<StepOutput> Run(const Step& step) override {
    std::unique_lock lock(mutex_);
    ++num_runs_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !held_; });
    StepOutput output;
    for (const GroupStep& group : step.groups) {
      GroupOutput& answer = output.groups.emplace_back();
      answer.failures.resize(group.sequences.size());
      for (const LogitRow& row : group.rows) answer.rows.push_back(Answer(group, row));
      if (steps_to_failure_ > 0 && --steps_to_failure_ == 0) {
        for (std::string& failure : answer.failures) failure = "layer 2: not finite";
      }
    }
    return output;
  }

  void SetScript(uint64_t seed, std::vector<int32_t> tokens) {
    std::lock_guard lock(mutex_);
    scripts_[seed] = std::move(tokens);
  }
  // Steps wait inside Run until Release().
  void Hold() {
    std::lock_guard lock(mutex_);
    held_ = true;
    num_runs_at_hold_ = num_runs_;
  }
  void Release() {
    std::lock_guard lock(mutex_);
    held_ = false;
    changed_.notify_all();
  }
  // Until a step that began after Hold() waits.
  void WaitForRun() {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(20), [&] { return num_runs_ > num_runs_at_hold_; });
  }
  void FailAfter(int steps) {
    std::lock_guard lock(mutex_);
    steps_to_failure_ = steps;
  }

 private:
  static float LogprobOf(int32_t token) { return -0.125F * static_cast<float>(token % 8) - 0.1F; }

  RowOutput Answer(const GroupStep& group, const LogitRow& row) {
    RowOutput output;
    output.token = row.target;
    if (row.sampling >= 0) {
      const SamplingRow& sampling = group.sampling[static_cast<size_t>(row.sampling)];
      const auto& script = scripts_.contains(sampling.seed) ? scripts_[sampling.seed] : scripts_[0];
      int& place = places_[{sampling.seed, sampling.choice}];
      output.token = script[static_cast<size_t>(place++) % script.size()];
    }
    output.logprob = LogprobOf(output.token);
    for (int i = 0; i < row.num_logprobs; ++i)
      output.top.push_back({300 + i, -0.5F * static_cast<float>(i) - 0.25F});
    return output;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool held_ = false;
  int num_runs_ = 0;
  int num_runs_at_hold_ = 0;
  int steps_to_failure_ = 0;
  std::map<uint64_t, std::vector<int32_t>> scripts_;
  std::map<std::pair<uint64_t, uint32_t>, int> places_;
};

struct WireResponse {
  int status = 0;
  std::string head;
  std::string body;  // chunks joined
  bool complete = false;
};

// A blocking client connection with a deadline on every wait.
class Wire {
 public:
  explicit Wire(int port, int receive_buffer = 0) : socket_(::socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer > 0) {
      ::setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    }
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = ::connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  }
  ~Wire() { Close(); }
  Wire(const Wire&) = delete;
  Wire& operator=(const Wire&) = delete;

  void Close() {
    if (socket_ >= 0) ::close(std::exchange(socket_, -1));
  }
  bool connected() const { return connected_; }
  void FinishSending() { ::shutdown(socket_, SHUT_WR); }
  void Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
  }
  // Appends what arrives; false at the end of the connection or after 20 s.
  bool Fill() {
    pollfd poll{.fd = socket_, .events = POLLIN, .revents = 0};
    if (::poll(&poll, 1, 20000) <= 0) return false;
    char buffer[16384];
    const ssize_t size = ::recv(socket_, buffer, sizeof(buffer), 0);
    if (size <= 0) return false;
    input_.append(buffer, static_cast<size_t>(size));
    return true;
  }
  // Waits until `text` has arrived.
  bool ReadUntil(std::string_view text) {
    while (input_.find(text) == std::string::npos) {
      if (!Fill()) return false;
    }
    return true;
  }
  bool AtEnd() {
    while (Fill()) {
    }
    return input_.empty();
  }
  WireResponse Read(bool head_only = false) {
    WireResponse response;
    if (!ReadUntil("\r\n\r\n")) return response;
    const size_t end = input_.find("\r\n\r\n") + 4;
    response.head = input_.substr(0, end);
    input_.erase(0, end);
    response.status = std::stoi(response.head.substr(9, 3));
    if (head_only || response.status == 100) {
      response.complete = true;
    } else if (response.head.find("Transfer-Encoding: chunked") != std::string::npos) {
      ReadChunks(response);
    } else if (const size_t at = response.head.find("Content-Length: "); at != std::string::npos) {
      const size_t length = std::stoul(response.head.substr(at + 16));
      while (input_.size() < length && Fill()) {
      }
      response.complete = input_.size() >= length;
      response.body = input_.substr(0, length);
      input_.erase(0, length);
    } else {
      while (Fill()) {
      }
      response.body = std::exchange(input_, {});
      response.complete = true;
    }
    return response;
  }

 private:
  void ReadChunks(WireResponse& response) {
    while (ReadUntil("\r\n")) {
      const size_t line = input_.find("\r\n");
      const size_t size = std::stoul(input_.substr(0, line), nullptr, 16);
      while (input_.size() < line + 4 + size) {
        if (!Fill()) return;
      }
      response.body += input_.substr(line + 2, size);
      input_.erase(0, line + 4 + size);
      if (size == 0) {
        response.complete = true;
        return;
      }
    }
  }

  int socket_;
  bool connected_ = false;
  std::string input_;
};

// Model tiny-r1's tokenizer and template, 64 blocks of 8 positions unless `engine_options` says otherwise.
class ScriptedWorld {
 public:
  explicit ScriptedWorld(ApiOptions api = {}, int max_model_len = 256, int num_blocks = 256,
                         int max_queued = 1000)
      : tokenizer_(Tokenizer::Load(std::string(TESSERA_SOURCE_DIR) + "/models/tiny-r1").value()),
        chat_template_(ChatTemplate::Compile(tokenizer_->chat_template(), *tokenizer_).value()) {
    executor_.SetScript(0, Ids("alpha beta gamma delta"));
    EngineOptions options;
    options.num_blocks = num_blocks;
    options.block_size = 8;
    options.max_num_seqs = 64;
    options.max_num_batched_tokens = 512;
    options.max_model_len = max_model_len;
    options.max_queued_requests = max_queued;
    options.vocab_size = tokenizer_->vocab_size();
    engine_ = std::make_unique<Engine>(options, executor_, clock_);
    if (api.model_names.empty()) api.model_names = {"tiny", "alias"};
    api.port = 0;
    api.version = "1.2.3";
    api.max_model_len = max_model_len;
    api.eos_ids = {*tokenizer_->eos_id()};
    api.block_size = options.block_size;
    api.num_blocks = options.num_blocks;
    server_ = ApiServer::Start(api, {.engine = *engine_,
                                     .tokenizer = *tokenizer_,
                                     .chat_template = chat_template_.get(),
                                     .clock = clock_})
                  .value();
  }
  ~ScriptedWorld() {
    executor_.Release();
    server_.reset();
  }

  std::vector<int32_t> Ids(std::string_view text) {
    return tokenizer_->Encode(text, ControlTokens::kParse).value();
  }
  int port() const { return server_->port(); }
  ApiServer& server() { return *server_; }
  Engine& engine() { return *engine_; }
  ScriptedExecutor& executor() { return executor_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }

  static std::string PostText(std::string_view path, std::string_view body, std::string_view headers = "") {
    return Format(
        "POST {} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n{}Content-Length: {}\r\n\r\n{}",
        path, headers, body.size(), body);
  }
  WireResponse Post(std::string_view path, std::string_view body, std::string_view headers = "") {
    Wire wire(port());
    wire.Send(PostText(path, body, headers));
    return wire.Read();
  }
  WireResponse Get(std::string_view path, std::string_view headers = "") {
    Wire wire(port());
    wire.Send(Format("GET {} HTTP/1.1\r\nHost: t\r\n{}\r\n", path, headers));
    return wire.Read();
  }
  // True when no sequence and no block is in use, within 20 s.
  bool BecomesEmpty() {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (std::chrono::steady_clock::now() < end) {
      const EngineStats stats = engine_->Stats();
      if (stats.num_running + stats.num_waiting + stats.num_blocks_used == 0) return true;
      std::this_thread::yield();
    }
    return false;
  }

 private:
  SteadyClock clock_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ChatTemplate> chat_template_;
  ScriptedExecutor executor_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<ApiServer> server_;
};

// The payloads of an event stream.
inline std::vector<std::string> Events(const std::string& body) {
  std::vector<std::string> events;
  for (size_t at = 0; at < body.size();) {
    const size_t end = body.find("\n\n", at);
    if (end == std::string::npos || body.compare(at, 6, "data: ") != 0)
      return {"malformed: " + body.substr(at)};
    events.push_back(body.substr(at + 6, end - at - 6));
    at = end + 2;
  }
  return events;
}

}  // namespace tessera::test
