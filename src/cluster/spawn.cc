// posix_spawn, and the numbers that descriptors get in the child.
#include "cluster/spawn.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

namespace tessera {

Result<pid_t> Spawn(const std::string& program, const std::vector<std::string>& arguments,
                    std::span<const int> descriptors) {
  std::vector<char*> words;
  for (const std::string& argument : arguments) words.push_back(const_cast<char*>(argument.c_str()));
  words.push_back(nullptr);
  std::vector<Socket> high;  // out of the way of the numbers that the child gets
  for (const int descriptor : descriptors) high.emplace_back(fcntl(descriptor, F_DUPFD_CLOEXEC, 16));
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  for (size_t i = 0; i < high.size(); ++i) {
    if (high[i].open()) {
      posix_spawn_file_actions_adddup2(&actions, high[i].descriptor(), static_cast<int>(i));
    } else {
      posix_spawn_file_actions_addopen(&actions, static_cast<int>(i), "/dev/null", O_RDWR, 0);
    }
  }
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none, all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  pid_t process = -1;
  const int error = posix_spawn(&process, program.c_str(), &actions, &attributes, words.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  if (error != 0) return Fail(ErrorKind::kUnavailable, "{} cannot start: {}", program, strerror(error));
  return process;
}

Socket OpenPidfd(pid_t process) {
  return Socket(static_cast<int>(syscall(SYS_pidfd_open, process, 0)));
}

}  // namespace tessera
