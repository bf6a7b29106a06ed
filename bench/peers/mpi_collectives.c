// The collectives of `tessera bench comm` by MPI, on the same shapes, timed the same way: 25 short runs of calls in
// a stream, median and best. Prints "collective bytes median_us best_us" lines on rank 0. Built and run by
// bench/comm.py; no part of Tessera.
//
// usage: mpi_collectives TIME_MS BYTES...
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kRuns = 25 };
static const char* const kNames[] = {"all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"};

static int rank, size;
static int64_t *source, *receive;
static int *counts, *offsets, *own_counts, *own_offsets;

static void Call(int collective, int values) {
  switch (collective) {
    case 0:
      MPI_Allreduce(source, receive, values, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
      break;
    case 1:
      MPI_Reduce_scatter(source, receive, counts, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
      break;
    case 2:
      MPI_Allgatherv(source, counts[rank], MPI_INT64_T, receive, counts, offsets, MPI_INT64_T, MPI_COMM_WORLD);
      break;
    case 3:
      MPI_Alltoallv(source, counts, offsets, MPI_INT64_T, receive, own_counts, own_offsets, MPI_INT64_T,
                    MPI_COMM_WORLD);
      break;
    case 4:
      MPI_Bcast(source, values, MPI_INT64_T, 0, MPI_COMM_WORLD);
      break;
    default:
      MPI_Barrier(MPI_COMM_WORLD);
  }
}

static int Ascending(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

static void Measure(const char* name, int collective, long bytes, double time_us) {
  const int values = (int)(bytes / 8);
  for (int i = 0; i < size; ++i) {
    offsets[i] = (int)((int64_t)values * i / size);
    counts[i] = (int)((int64_t)values * (i + 1) / size) - offsets[i];
  }
  for (int i = 0; i < size; ++i) {
    own_counts[i] = counts[rank];
    own_offsets[i] = i * counts[rank];
  }
  double runs[kRuns];
  int64_t calls = 10;
  for (int run = -1; run < kRuns; ++run) {
    MPI_Bcast(&calls, 1, MPI_INT64_T, 0, MPI_COMM_WORLD);
    MPI_Barrier(MPI_COMM_WORLD);
    const double begin = MPI_Wtime();
    for (int64_t i = 0; i < calls; ++i) Call(collective, values);
    MPI_Barrier(MPI_COMM_WORLD);
    const double each = (MPI_Wtime() - begin) * 1e6 / (double)calls;
    if (run >= 0) {
      runs[run] = each;
    } else {
      calls = (int64_t)(time_us / kRuns / each);
      calls = calls < 5 ? 5 : calls > 100000 ? 100000 : calls;
    }
  }
  qsort(runs, kRuns, sizeof(double), Ascending);
  if (rank == 0) printf("%s %ld %.3f %.3f\n", name, bytes, runs[kRuns / 2], runs[0]);
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (argc < 3) MPI_Abort(MPI_COMM_WORLD, 2);
  const double time_us = atof(argv[1]) * 1000;
  long largest = 8;
  for (int i = 2; i < argc; ++i) largest = atol(argv[i]) > largest ? atol(argv[i]) : largest;
  source = malloc((size_t)largest);
  receive = malloc((size_t)largest * (size_t)size);
  memset(receive, 0, (size_t)largest * (size_t)size);
  for (long i = 0; i < largest / 8; ++i) source[i] = (int64_t)(i * 0x9E3779B97F4A7C15LL) >> 34;
  counts = malloc(4 * (size_t)size * sizeof(int));
  offsets = counts + size;
  own_counts = offsets + size;
  own_offsets = own_counts + size;
  Measure("barrier", -1, 0, time_us);
  for (int collective = 0; collective < 5; ++collective)
    for (int i = 2; i < argc; ++i) Measure(kNames[collective], collective, atol(argv[i]), time_us);
  MPI_Finalize();
  return 0;
}
