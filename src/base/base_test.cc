// The words every room uses, each with the property its callers rely on.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>

#include "base/file.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/sha256.h"
#include "base/threads.h"

namespace tessera {
namespace {

TEST(Philox, MatchesPublishedVectors) {
  // Known answers of Random123 for philox4x32-10.
  EXPECT_EQ(Philox4x32(0, {0, 0, 0, 0}), (PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32(~uint64_t{0}, {~0u, ~0u, ~0u, ~0u}),
            (PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32(0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}),
            (PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, UnitFloatStaysBelowOne) {
  EXPECT_EQ(UnitFloat(0), 0.0f);
  EXPECT_LT(UnitFloat(~0u), 1.0f);
}

TEST(Sha256, MatchesFips180) {
  const std::string_view abc = "abc";
  EXPECT_EQ(Hex(HashSha256(std::as_bytes(std::span(abc)))),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 300; ++round) {
      const int tasks = round % 37;
      std::vector<int> hits(tasks, 0);
      pool.ParallelFor(tasks, [&](int task, int thread) {
        EXPECT_LT(thread, threads);
        ++hits[task];
      });
      EXPECT_EQ(std::accumulate(hits.begin(), hits.end(), 0), tasks);
      EXPECT_TRUE(std::all_of(hits.begin(), hits.end(), [](int n) { return n == 1; }));
    }
  }
}

TEST(ThreadPool, WakesSleepingWorkers) {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::atomic<int> sum = 0;
    pool.ParallelFor(100, [&](int task, int) { sum += task; });
    EXPECT_EQ(sum, 4950);
  }
}

// Task 0 ends after all others, of which some lie in the same thread's share.
TEST(ThreadPool, OthersTakeTheTasksOfABusyThread) {
  ThreadPool pool(2);
  std::atomic<int> others = 0;
  pool.ParallelFor(8, [&](int task, int) {
    if (task != 0) {
      ++others;
      return;
    }
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (others < 7 && std::chrono::steady_clock::now() < limit) std::this_thread::yield();
    EXPECT_EQ(others, 7);
  });
}

TEST(ThreadPool, UsesFewerThreadsAndMoreAgain) {
  ThreadPool pool(4);
  for (int round = 0; round < 400; ++round) {
    pool.Use(round % 5);
    EXPECT_EQ(pool.num_active(), std::max(1, round % 5));
    std::vector<int> hits(round % 23, 0);
    pool.ParallelFor(static_cast<int>(hits.size()), [&](int task, int thread) {
      EXPECT_LT(thread, pool.num_active() == 1 ? 1 : 4);
      ++hits[task];
    });
    EXPECT_TRUE(std::all_of(hits.begin(), hits.end(), [](int n) { return n == 1; }));
  }
}

TEST(ThreadPool, WorkersStayOnTheirCores) {
  const std::vector<int> allowed = AllowedCores();
  ASSERT_FALSE(allowed.empty());
  const std::vector<int> cores = {allowed.front(), allowed.back(), allowed.front()};
  ThreadPool pool(3, /*own_cores=*/false, cores);
  for (int round = 0; round < 50; ++round) {
    pool.ParallelFor(30, [&](int, int thread) {
      if (thread == 0) return;
      EXPECT_EQ(sched_getcpu(), cores[thread]);
    });
  }
}

TEST(Arena, IsZeroAlignedAndLazy) {
  const uint64_t before = ResidentBytes();
  auto arena = Arena::Allocate(size_t{1} << 33);
  ASSERT_TRUE(arena) << arena.error().message;
  EXPECT_LT(ResidentBytes(), before + (64 << 20));
  EXPECT_EQ(arena->TakeArray<int>(3)[2], 0);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(arena->Take(1)) % 64, 0u);
}

TEST(Arena, TooLargeIsAnError) {
  auto arena = Arena::Allocate(size_t{1} << 62);
  ASSERT_FALSE(arena);
  EXPECT_EQ(arena.error().kind, ErrorKind::kExhausted);
}

TEST(Memory, LimitsAreSane) {
  EXPECT_GT(MemoryLimitBytes(), uint64_t{64} << 20);
  EXPECT_LE(MemoryAvailableBytes(), MemoryLimitBytes());
  EXPECT_GE(AvailableCores(), 1);
}

TEST(File, ErrorsNamePathAndReason) {
  auto missing = ReadFile("/nonexistent/x");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().kind, ErrorKind::kNotFound);
  EXPECT_NE(missing.error().message.find("/nonexistent/x"), std::string::npos);
  char path[] = "/tmp/tessera_file_XXXXXX";
  close(mkstemp(path));
  ASSERT_TRUE(WriteFile(path, "0123456789"));
  EXPECT_EQ(ReadFile(path).value(), "0123456789");
  EXPECT_FALSE(ReadFile(path, 5));
  auto file = RandomAccessFile::Open(path);
  char tail[4];
  EXPECT_TRUE(file->Read(6, std::as_writable_bytes(std::span(tail))));
  EXPECT_EQ(std::string_view(tail, 4), "6789");
  EXPECT_FALSE(file->Read(7, std::as_writable_bytes(std::span(tail))));
  unlink(path);
}

TEST(File, PrefetchBringsBytesIntoThePageCache) {
  char path[] = "/var/tmp/tessera_file_XXXXXX";
  const int descriptor = mkstemp(path);
  ASSERT_GE(descriptor, 0);
  constexpr uint64_t kSize = uint64_t{3} << 20;
  ASSERT_TRUE(WriteFile(path, std::string(kSize, 'x')));
  fsync(descriptor);
  posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
  void* const mapping = mmap(nullptr, kSize, PROT_READ, MAP_SHARED, descriptor, 0);
  ASSERT_NE(mapping, MAP_FAILED);
  const auto is_cached = [&](uint64_t at) {
    unsigned char resident = 0;
    EXPECT_EQ(mincore(static_cast<std::byte*>(mapping) + at / 4096 * 4096, 1, &resident), 0);
    return (resident & 1) != 0;
  };
  const auto file = RandomAccessFile::Open(path);
  unlink(path);
  if (is_cached(kSize / 2)) GTEST_SKIP() << "this file system keeps everything in memory";
  file->Prefetch(kSize / 3, 2 * kSize);  // ends at the end of the file
  for (int wait = 0; wait < 1000 && !(is_cached(kSize / 2) && is_cached(kSize - 1)); ++wait) usleep(10000);
  EXPECT_TRUE(is_cached(kSize / 2));
  EXPECT_TRUE(is_cached(kSize - 1));
  munmap(mapping, kSize);
  close(descriptor);
}

}  // namespace
}  // namespace tessera
