// Launchers' variables in, the flags of a launch out: every rule as a row, every contradiction by its
// message.
#include "cli/launch_environment.h"

#include <gtest/gtest.h>

#include <map>
#include <sstream>

namespace tessera::cli {
namespace {

using Variables = std::map<std::string, std::string>;

Variable Of(const Variables& variables) {
  return [&variables](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  };
}

// "--nnodes 2 --node-rank 1 --master-addr n001" of a command line in an environment, or the error.
std::string Launch(const Variables& variables, const std::string& line = "") {
  std::istringstream stream("model " + line);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  const auto parsed = ParseServe(words, Of(variables));
  if (!parsed) return parsed.error().message;
  const ParallelFlags& p = parsed->options.parallel;
  EXPECT_EQ(p.IsWorker(), p.headless || p.node_rank.value_or(0) > 0);
  return Format("--nnodes {} --node-rank {} --master-addr {}", p.nnodes, p.node_rank.value_or(0),
                p.master_addr);
}

std::string Note(const Variables& variables, const std::string& flag = "-tp=2") {
  const auto parsed = ParseServe(std::vector<std::string>{"model", flag}, Of(variables));
  if (!parsed) return parsed.error().message;
  return parsed->notes.empty() ? "" : parsed->notes[0];
}

void ExpectHas(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks '" << part << "'";
}

Variables With(Variables base, const Variables& changes) {
  for (const auto& [name, value] : changes) base[name] = value;
  return base;
}

// As Slurm 22.05 sets them in a task of srun, beside others.
const Variables kSlurm = {{"SLURM_JOB_ID", "17"},
                          {"SLURM_JOB_NUM_NODES", "4"},
                          {"SLURM_NNODES", "4"},
                          {"SLURM_JOB_NODELIST", "n[000-003]"},
                          {"SLURM_STEP_ID", "0"},
                          {"SLURM_STEP_NUM_NODES", "2"},
                          {"SLURM_STEP_NUM_TASKS", "2"},
                          {"SLURM_STEP_NODELIST", "n[001-002]"},
                          {"SLURM_STEP_TASKS_PER_NODE", "1(x2)"},
                          {"SLURM_NODEID", "1"},
                          {"SLURM_PROCID", "1"},
                          {"SLURM_LOCALID", "0"}};
const Variables kOpenMpi = {{"OMPI_COMM_WORLD_SIZE", "3"},
                            {"OMPI_COMM_WORLD_RANK", "2"},
                            {"OMPI_COMM_WORLD_LOCAL_SIZE", "1"},
                            {"OMPI_COMM_WORLD_LOCAL_RANK", "0"}};
const Variables kGroup = {
    {"LWS_GROUP_SIZE", "2"}, {"LWS_WORKER_INDEX", "0"}, {"LWS_LEADER_ADDRESS", "tessera-0.tessera.default"}};
const std::string kAlone = "--nnodes 1 --node-rank 0 --master-addr ";

TEST(LaunchEnvironment, EachLauncher) {
  EXPECT_EQ(Launch({}), kAlone);
  EXPECT_EQ(Launch(kSlurm), "--nnodes 2 --node-rank 1 --master-addr n001");
  EXPECT_EQ(Launch(kGroup), "--nnodes 2 --node-rank 0 --master-addr tessera-0.tessera.default");
  EXPECT_EQ(Launch(kOpenMpi, "--master-addr 10.0.0.1"), "--nnodes 3 --node-rank 2 --master-addr 10.0.0.1");
  EXPECT_EQ(
      Note(kSlurm),
      "SLURM_STEP_NUM_NODES 2, SLURM_NODEID 1, SLURM_STEP_NODELIST n[001-002]: as if --nnodes 2 --node-rank "
      "1 --master-addr n001 were given");
  EXPECT_EQ(
      Note(kGroup),
      "LWS_GROUP_SIZE 2, LWS_WORKER_INDEX 0, LWS_LEADER_ADDRESS tessera-0.tessera.default: as if --nnodes 2 "
      "--node-rank 0 --master-addr tessera-0.tessera.default were given");
  EXPECT_EQ(Note({}), "");
}

TEST(LaunchEnvironment, OneHostIsLeftAlone) {
  // The script of sbatch on four hosts, and the shell of salloc or of srun --pty on one.
  Variables batch = kSlurm;
  for (const char* name :
       {"SLURM_STEP_ID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"})
    batch.erase(name);
  EXPECT_EQ(Launch(batch), kAlone);
  const Variables shell = With(kSlurm, {{"SLURM_STEP_ID", "4294967290"},
                                        {"SLURM_STEP_NUM_NODES", "1"},
                                        {"SLURM_STEP_NUM_TASKS", "8"},
                                        {"SLURM_STEP_NODELIST", "n001"},
                                        {"SLURM_NODEID", "0"}});
  EXPECT_EQ(Launch(shell), kAlone);
  EXPECT_EQ(Launch(With(kOpenMpi, {{"OMPI_COMM_WORLD_SIZE", "1"}, {"OMPI_COMM_WORLD_RANK", "0"}})), kAlone);
  EXPECT_EQ(Launch({{"LWS_GROUP_SIZE", "1"}}), kAlone);
  EXPECT_EQ(Launch(With(kSlurm, {{"SLURM_STEP_NUM_NODES", ""}})), kAlone);
  EXPECT_EQ(Note(shell), "");
}

TEST(LaunchEnvironment, FlagsRule) {
  for (const Variables& variables : {kSlurm, kOpenMpi, kGroup}) {
    EXPECT_EQ(Launch(variables, "--nnodes 1"), kAlone);
    EXPECT_EQ(Launch(variables, "--nnodes 4 --node-rank 3 --master-addr h"),
              "--nnodes 4 --node-rank 3 --master-addr h");
    EXPECT_EQ(Launch(variables, "--distributed-executor-backend uni"), kAlone);
    for (const char* groups :
         {"-dpl 1", "-dpl=1 -dpr=1 --headless", "-dpa 10.0.0.1", "--data_parallel_rpc_port 9"})
      EXPECT_EQ(Launch(variables, std::string("-dp 2 ") + groups), kAlone) << groups;
  }
  // Of a launcher's place, the head's address and port may be typed.
  EXPECT_EQ(Launch(kSlurm, "--master-addr 10.0.0.7 --master-port 9"),
            "--nnodes 2 --node-rank 1 --master-addr 10.0.0.7");
  EXPECT_EQ(Launch(kSlurm, "--distributed-executor-backend mp"),
            "--nnodes 2 --node-rank 1 --master-addr n001");
  // What flags forbid each other, they forbid launchers too.
  ExpectHas(Launch(kSlurm, "--api-server-count 1"), {"--api-server-count 1", "wanted 0"});
  // Wrong variables do not matter to whoever is placed by flags.
  EXPECT_EQ(Launch(With(kSlurm, {{"SLURM_NODEID", "7"}}), "--nnodes 1"), kAlone);
}

TEST(LaunchEnvironment, WhatContradicts) {
  struct Row {
    Variables base, changes;
    std::vector<std::string> parts;
  };
  for (const Row& row : std::vector<Row>{
           {kSlurm,
            {{"SLURM_NODEID", "2"}},
            {"SLURM_NODEID is '2'", "SLURM_STEP_NUM_NODES 2", "0 to 1", "--nnodes"}},
           {kSlurm, {{"SLURM_NODEID", "-1"}}, {"SLURM_NODEID is '-1'"}},
           {kSlurm, {{"SLURM_NODEID", ""}}, {"SLURM_NODEID is not set beside SLURM_STEP_NUM_NODES 2"}},
           {kSlurm,
            {{"SLURM_STEP_NUM_NODES", "two"}},
            {"SLURM_STEP_NUM_NODES is 'two': wanted", "from 1 to 4096"}},
           {kSlurm, {{"SLURM_STEP_NUM_NODES", "5000"}}, {"'5000'", "from 1 to 4096"}},
           {kSlurm, {{"SLURM_STEP_NUM_TASKS", ""}}, {"SLURM_STEP_NUM_TASKS is not set"}},
           {kSlurm,
            {{"SLURM_STEP_NUM_TASKS", "16"}},
            {"SLURM_STEP_NUM_TASKS is 16", "SLURM_STEP_NUM_NODES 2", "srun --nodes=2 --ntasks-per-node=1"}},
           {kSlurm, {{"SLURM_STEP_NODELIST", ""}}, {"SLURM_STEP_NODELIST is not set"}},
           {kSlurm,
            {{"SLURM_STEP_NODELIST", "n[01"}},
            {"SLURM_STEP_NODELIST: 'n[01' is not a list of hosts"}},
           {kOpenMpi, {}, {"OMPI_COMM_WORLD_SIZE 3, OMPI_COMM_WORLD_RANK 2", "give --master-addr"}},
           {kOpenMpi,
            {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}},
            {"OMPI_COMM_WORLD_LOCAL_SIZE is 2", "OMPI_COMM_WORLD_SIZE 3", "mpirun --map-by ppr:1:node"}},
           {kOpenMpi, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}}, {"is '4'", "from 1 to 3"}},
           {kOpenMpi, {{"OMPI_COMM_WORLD_RANK", "3"}}, {"OMPI_COMM_WORLD_RANK is '3'", "0 to 2"}},
           {kGroup, {{"LWS_WORKER_INDEX", ""}}, {"LWS_WORKER_INDEX is not set beside LWS_GROUP_SIZE 2"}},
           {kGroup, {{"LWS_WORKER_INDEX", "2x"}}, {"LWS_WORKER_INDEX is '2x'"}},
           {kGroup, {{"LWS_LEADER_ADDRESS", ""}}, {"LWS_LEADER_ADDRESS is not set"}},
           {kGroup,
            kSlurm,
            {"two launchers", "LWS_GROUP_SIZE 2", "SLURM_STEP_NUM_NODES 2",
             "--nnodes, --node-rank and --master-addr"}},
           {kGroup, kOpenMpi, {"two launchers", "LWS_GROUP_SIZE 2", "OMPI_COMM_WORLD_SIZE 3"}},
       }) {
    ExpectHas(Launch(With(row.base, row.changes), "-tp 2"), row.parts);
  }
}

// mpirun in a job of Slurm: its servants on the other hosts were started by srun.
TEST(LaunchEnvironment, OpenMpiInsideOfSlurm) {
  EXPECT_EQ(Launch(With(kSlurm, kOpenMpi), "--master-addr n000"),
            "--nnodes 3 --node-rank 2 --master-addr n000");
}

TEST(LaunchEnvironment, FirstHost) {
  for (const auto& [list, host] : std::map<std::string, std::string>{
           {"n1", "n1"},
           {"n1,n2", "n1"},
           {"node[001-004,007],gpu3", "node001"},
           {"node[7]", "node7"},
           {"node[3,1-2]", "node3"},
           {"rack[2-3]node[10-11].example,x", "rack2node10.example"},
           {"gpu-a_1.cluster,", "gpu-a_1.cluster"},
           {"n[1-2", ""},
           {"n[]", ""},
           {"n[a-b]", ""},
           {"n[-1]", ""},
           {"n[1-2]]", ""},
           {"n]", ""},
           {",n1", ""},
           {"", ""},
           {"[", ""},
           {"n 1", ""},
           {"n1;rm", ""},
           {"n$(x)", ""},
           {"n[[1]]", ""},
           {std::string(254, 'n'), ""},
           {std::string(253, 'n'), std::string(253, 'n')},
           {"n[" + std::string(300, '1') + "]", ""},
       }) {
    const auto found = FirstHost(list);
    EXPECT_EQ(found.value_or(""), host) << list;
    if (!found) {
      EXPECT_NE(found.error().message.find("host"), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace tessera::cli
