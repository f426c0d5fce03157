/* A user's first program, valid as C17 and as C++17: plans for two ranks, and makes a group of one rank. */
#include <ultraep.h>

#include <stdio.h>
#include <stdlib.h>

static int plan_two_ranks(int64_t *before, int64_t *planned) {
  const int32_t loads[2][4] = {{90, 10, 0, 0}, {70, 10, 10, 10}}; /* [source rank][expert] */
  ultraepPlannerConfig_t config = {2, 4, 1, 0, 0, 0, 0, 0, 0};
  ultraepPlan_t plan;
  void *workspace;
  size_t bytes;
  int result = 1;

  if (ultraepPlannerWorkspaceSize(&config, &bytes) != ultraepSuccess) return 1;
  workspace = malloc(bytes);
  if (workspace && ultraepPlannerRun(&config, &loads[0][0], workspace, bytes, &plan) == ultraepSuccess) {
    *before = plan.maxBefore;
    *planned = plan.maxPlanned;
    result = 0;
  }
  free(workspace);
  return result;
}

static int make_group(void) {
  ultraepConfig_t config = ULTRAEP_CONFIG_INITIALIZER;
  ultraepHostWorld_t world;
  ultraepGroup_t group;
  int result;

  config.nExperts = 4;
  config.topK = 2;
  config.maxTokens = 16;
  config.hidden = 64;
  if (ultraepHostWorldCreate(&world, 1) != ultraepSuccess) return 1;
  result = ultraepGroupCreateHost(&group, world, 0, &config) != ultraepSuccess;
  if (!result) result = ultraepGroupDestroy(group) != ultraepSuccess;
  if (ultraepHostWorldDestroy(world) != ultraepSuccess) result = 1;
  return result;
}

int main(void) {
  const ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  const ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  int64_t before = 0, planned = 0;
  int version = 0;

  if (tensors.magic != ULTRAEP_MAGIC || experts.size != sizeof(experts)) return 1;
  if (ultraepGetVersion(&version) != ultraepSuccess || plan_two_ranks(&before, &planned) || make_group()) {
    fprintf(stderr, "ultraep: %s\n", ultraepGetLastError());
    return 1;
  }
  printf("ultraep %d.%d.%d: the busiest of 2 ranks gets %lld of 200 assignments, %lld when balanced\n",
         version / 10000, version / 100 % 100, version % 100, (long long)before, (long long)planned);
  return before == 180 && planned == 100 ? 0 : 1;
}
