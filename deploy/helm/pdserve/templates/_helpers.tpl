{{- define "pdserve.name" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "pdserve.selector" -}}
app.kubernetes.io/name: pdserve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pdserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "pdserve.selector" . }}
{{- end }}

{{- define "pdserve.image" -}}
{{ printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}

{{- define "pdserve.keysSecret" -}}
{{ default (printf "%s-api-keys" (include "pdserve.name" .)) .Values.auth.existingSecret }}
{{- end }}

{{- define "pdserve.raySecret" -}}
{{ default (printf "%s-ray-token" (include "pdserve.name" .)) .Values.ray.existingSecret }}
{{- end }}

{{- define "pdserve.redisSecret" -}}
{{ default (printf "%s-redis" (include "pdserve.name" .)) .Values.redis.existingSecret }}
{{- end }}

{{- /* Which pods decide how many engines there are; empty without policies. */}}
{{- define "pdserve.decider" -}}
{{- if .Values.policies }}{{ ternary "scaler" "router" (eq .Values.ray.mode "none") }}{{ end -}}
{{- end }}

{{- /* How many machines each engine of a pool (root, role) is spread over. */}}
{{- define "pdserve.hosts" -}}
{{ get (get (default (dict) .root.Values.config.pools) .role | default dict) "hosts" | default 1 | int }}
{{- end }}

{{- /* What holds the pods of a pool (root, role) in which engines are pods: kind, or kind and version for references. */}}
{{- define "pdserve.holder" -}}
{{ ternary "LeaderWorkerSet" "StatefulSet" (gt (int (include "pdserve.hosts" .)) 1) }}
{{- end }}
{{- define "pdserve.holderRef" -}}
{{- $kind := include "pdserve.holder" . -}}
{apiVersion: {{ ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" (eq $kind "LeaderWorkerSet") }}, kind: {{ $kind }}, name: {{ include "pdserve.name" .root }}-{{ .role }}}
{{- end }}

{{- define "pdserve.rayHead" -}}
{{ printf "%s-ray-head%s" (include "pdserve.name" .) (ternary "-svc" "" (eq .Values.ray.mode "kuberay")) }}
{{- end }}

{{- /* Seconds; checked in checks.yaml. */}}
{{- define "pdserve.neededGrace" -}}
{{ add .Values.drain.preStopSeconds (ceil .Values.config.times.drain_timeout) 15 }}
{{- end }}
{{- define "pdserve.grace" -}}
{{ if kindIs "invalid" .Values.drain.gracePeriodSeconds }}{{ include "pdserve.neededGrace" . }}{{ else }}{{ .Values.drain.gracePeriodSeconds }}{{ end }}
{{- end }}

{{- define "pdserve.modelPath" -}}
{{ if eq .Values.model.source "demo" }}demo{{ else }}{{ printf "/models/%s" (trimAll "/" .Values.model.path) | trimSuffix "/" }}{{ end }}
{{- end }}

{{- /* Settings that routers alone read: no engine and no scaler is told of them, nor restarted for them. */}}
{{- define "pdserve.routerSettings" -}}
[admission, idempotency, limits, replay, routing, slo, telemetry, tenants, workers]
{{- end }}

{{- /* What every process is told: what values say, the model, and how many engines there are. */}}
{{- define "pdserve.engineConfig" -}}
{{- $own := dict "model" (include "pdserve.modelPath" .) -}}
{{- with .Values.model.name }}{{ $_ := set $own "served_model_name" . }}{{ end -}}
{{- $pools := deepCopy (default (dict) .Values.config.pools) -}}
{{- range $role := list "prefill" "decode" -}}
{{- $values := index $.Values $role -}}
{{- $pool := default (dict) (get $pools $role) -}}
{{- if ne $.Values.ray.mode "none" -}}
{{- $_ := set $pool "engines" (int $values.replicas) -}}
{{- $placement := dict "resources" (dict (printf "pdserve_%s" $role) 1) -}}
{{- with $values.gpus }}{{ $_ := set $placement "gpus" (int .) }}{{ end -}}
{{- $_ := set $pool "placement" $placement -}}
{{- end -}}
{{- if $pool }}{{ $_ := set $pools $role $pool }}{{ end -}}
{{- end -}}
{{- with $pools }}{{ $_ := set $own "pools" . }}{{ end -}}
{{- $given := deepCopy .Values.config -}}
{{- range include "pdserve.routerSettings" . | fromYamlArray }}{{ $_ := unset $given . }}{{ end -}}
{{ toYaml (mergeOverwrite $given $own) }}
{{- end }}

{{- /* Routers are told besides where to listen, who may enter, and where engines, Redis and the scaler are. */}}
{{- define "pdserve.routerConfig" -}}
{{- $name := include "pdserve.name" . -}}
{{- $own := dict "host" "0.0.0.0" "port" 8000 "grpc_port" 8001 "admin_host" "0.0.0.0" "admin_port" 8002 "api_keys_file" "/etc/pdserve/keys/api-keys" -}}
{{- range include "pdserve.routerSettings" . | fromYamlArray -}}
{{- if hasKey $.Values.config . }}{{ $_ := set $own . (get $.Values.config .) }}{{ end -}}
{{- end -}}
{{- if eq .Values.ray.mode "none" -}}
{{- $targets := list (printf "%s-prefill.%s.svc:8100" $name .Release.Namespace) (printf "%s-decode.%s.svc:8100" $name .Release.Namespace) -}}
{{- $_ := set $own "discovery" (dict "engines" $targets) -}}
{{- else -}}
{{- $_ := set $own "launcher" "ray" -}}
{{- $_ := set $own "ray" (dict "address" (printf "%s.%s.svc:6379" (include "pdserve.rayHead" .) .Release.Namespace) "auth_token_file" "/etc/pdserve/ray/token") -}}
{{- end -}}
{{- if ne .Values.redis.mode "none" -}}
{{- $_ := set $own "redis" (dict "namespace" (printf "%s.%s" $name .Release.Namespace | trunc 64)) -}}
{{- end -}}
{{- with include "pdserve.decider" . -}}
{{- if eq . "scaler" -}}
{{- $_ := set $own "scaler" (dict "address" (printf "%s-scaler.%s.svc:8103" $name $.Release.Namespace)) -}}
{{- else -}}
{{- $_ := set $own "policies" "/etc/pdserve/policies/policies.yaml" -}}
{{- $_ := set $own "scaler" (dict "kubernetes" (include "pdserve.scaleTargets" $ | fromYaml)) -}}
{{- end -}}
{{- end -}}
{{ toYaml (mergeOverwrite (include "pdserve.engineConfig" . | fromYaml) $own) }}
{{- end }}

{{- /* Scalers are told whose number of pods they decide, by which policy, and how they agree on one of them. */}}
{{- define "pdserve.scalerConfig" -}}
{{- $name := include "pdserve.name" . -}}
{{- $kubernetes := include "pdserve.scaleTargets" . | fromYaml -}}
{{- $_ := set $kubernetes "lease" (printf "%s-scaler" $name) -}}
{{- $own := dict "policies" "/etc/pdserve/policies/policies.yaml" "scaler" (dict "kubernetes" $kubernetes) -}}
{{ toYaml (mergeOverwrite (include "pdserve.engineConfig" . | fromYaml) $own) }}
{{- end }}

{{- /* The number of a pool's pods, or groups of them (root, role); empty where it is not the chart's to say. A number that
Helm has once set it must go on setting, to what a scaler has made of it: left out, Kubernetes would make it 1. Ray nodes
begin with those the first engines need: each takes one for each of its hosts. */}}
{{- define "pdserve.replicas" -}}
{{- $v := .root.Values -}}
{{- $number := int (index $v .role).replicas -}}
{{- if ne $v.ray.mode "none" }}{{ $number = mul $number (include "pdserve.hosts" .) }}{{ end -}}
{{- if not (or $v.policies $v.hpa.enabled $v.keda.enabled) -}}
{{ $number }}
{{- else if eq $v.ray.mode "kuberay" -}}
{{- $cluster := lookup "ray.io/v1" "RayCluster" .root.Release.Namespace (printf "%s-ray" (include "pdserve.name" .root)) -}}
{{- range (dig "spec" "workerGroupSpecs" list $cluster) -}}
{{- if eq .groupName $.role }}{{ $number = int .replicas }}{{ end -}}
{{- end -}}
{{ $number }}
{{- else -}}
{{- $ref := ternary (include "pdserve.holderRef" . | fromYaml) (dict "apiVersion" "apps/v1" "kind" "StatefulSet") (eq $v.ray.mode "none") -}}
{{- $live := lookup $ref.apiVersion $ref.kind .root.Release.Namespace (printf "%s-%s" (include "pdserve.name" .root) .role) -}}
{{- if and $live (ne (dig "metadata" "annotations" "pdserve.dev/replicas" "" $live) "theirs") -}}
{{ int $live.spec.replicas }}
{{- else if ne $v.ray.mode "none" -}}
{{ $number }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "pdserve.scaleTargets" -}}
{{- $name := include "pdserve.name" . -}}
{{- range $role := list "prefill" "decode" }}
{{- $kind := ternary (include "pdserve.holder" (dict "root" $ "role" $role)) "StatefulSet" (eq $.Values.ray.mode "none") }}
{{ $role }}: {{ if eq $.Values.ray.mode "kuberay" }}{{ printf "RayCluster/%s-ray/%s" $name $role }}{{ else }}{{ printf "%s/%s-%s" $kind $name $role }}{{ end }}
{{- end }}
{{- end }}

{{- define "pdserve.podMeta" -}}
annotations:
  checksum/config: {{ include (dict "router" "pdserve.routerConfig" "scaler" "pdserve.scalerConfig" | dig .component "pdserve.engineConfig") .root | sha256sum }}
  {{- with .values.podAnnotations }}{{ toYaml . | nindent 2 }}{{ end }}
labels:
  {{- include "pdserve.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "pdserve.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "pdserve.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "pdserve.env" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: HOME, value: /tmp}
- {name: XDG_CACHE_HOME, value: /tmp/cache}
- {name: NUMBA_CACHE_DIR, value: /tmp/numba}
{{- with .values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "pdserve.redisEnv" -}}
{{- if eq .Values.redis.mode "bundled" }}
- name: REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "pdserve.redisSecret" . }}, key: password}}
- {name: PDSERVE_REDIS_URL, value: "redis://:$(REDIS_PASSWORD)@{{ include "pdserve.name" . }}-redis.{{ .Release.Namespace }}.svc:6379"}
{{- else if eq .Values.redis.mode "external" }}
- name: PDSERVE_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ include "pdserve.redisSecret" . }}, key: url}}
{{- end }}
{{- end }}

{{- define "pdserve.rayEnv" -}}
- {name: RAY_AUTH_MODE, value: token}
- {name: RAY_AUTH_TOKEN_PATH, value: /etc/pdserve/ray/token}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_health_check_initial_delay_ms, value: "1000"}
- {name: RAY_health_check_period_ms, value: "500"}
- {name: RAY_health_check_timeout_ms, value: "1000"}
- {name: RAY_health_check_failure_threshold, value: "3"}
{{- end }}

{{- define "pdserve.mounts" -}}
- {name: config, mountPath: /etc/pdserve/config, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if ne .Values.model.source "demo" }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- if ne .Values.ray.mode "none" }}
- {name: ray-token, mountPath: /etc/pdserve/ray, readOnly: true}
{{- end }}
{{- end }}

{{- define "pdserve.volumes" -}}
- name: config
  configMap: {name: {{ include "pdserve.name" . }}-config}
- name: tmp
  emptyDir: {}
{{- if ne .Values.ray.mode "none" }}
- name: ray-token
  secret: {secretName: {{ include "pdserve.raySecret" . }}, defaultMode: 0440}
{{- end }}
{{- if ne .Values.model.source "demo" }}
- name: model
{{- if eq .Values.model.source "pvc" }}
  persistentVolumeClaim: {claimName: {{ .Values.model.pvc.claimName }}, readOnly: true}
{{- else if eq .Values.model.source "hostPath" }}
  hostPath: {path: {{ .Values.model.hostPath.path }}, type: Directory}
{{- else if eq .Values.model.source "image" }}
  image: {reference: {{ .Values.model.image.reference | quote }}, pullPolicy: {{ .Values.model.image.pullPolicy }}}
{{- else }}
  emptyDir: {sizeLimit: {{ .Values.model.download.size | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "pdserve.sharedMemory" -}}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ . | quote }}}
{{- end }}

{{- define "pdserve.initContainers" -}}
{{- if eq .Values.model.source "download" }}
initContainers:
  - name: model
    image: {{ .Values.model.download.image | quote }}
    {{- with .Values.model.download.command }}
    command: {{ toJson . }}
    {{- end }}
    {{- with .Values.model.download.args }}
    args: {{ toJson . }}
    {{- end }}
    {{- with .Values.model.download.env }}
    env: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- include "pdserve.containerSecurity" . | nindent 4 }}
    volumeMounts:
      - {name: model, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}

{{- /* Where pods may go: root, values (of the component), component. */}}
{{- define "pdserve.scheduling" -}}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $affinity := deepCopy .values.affinity }}
{{- $engine := not (has .component (list "router" "scaler")) }}
{{- $domain := .root.Values.placement.domain }}
{{- if and $engine (ne $domain "none") }}
{{- $labels := merge (dict "pdserve.dev/engine" "true") (include "pdserve.selector" .root | fromYaml) }}
{{- $term := dict "topologyKey" .root.Values.placement.domainLabel "labelSelector" (dict "matchLabels" $labels) }}
{{- $together := ternary (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $term)) (dict "preferredDuringSchedulingIgnoredDuringExecution" (list (dict "weight" 100 "podAffinityTerm" $term))) (eq $domain "required") }}
{{- $affinity = merge $affinity (dict "podAffinity" $together) }}
{{- end }}
{{- with $affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ .root.Values.placement.spreadOver }}
    whenUnsatisfiable: {{ .root.Values.placement.spread }}
    labelSelector:
      matchLabels:
        {{- include "pdserve.selector" .root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* requests and limits of a pool's container, GPUs and network devices included */}}
{{- define "pdserve.poolResources" -}}
{{- $devices := dict }}
{{- if .gpus }}{{ $_ := set $devices .gpuResource (toString .gpus) }}{{ end }}
{{- if .rdma.resource }}{{ $_ := set $devices .rdma.resource (toString .rdma.count) }}{{ end }}
resources:
  requests: {{- merge (deepCopy $devices) (default (dict) .resources.requests) | toYaml | nindent 4 }}
  limits: {{- merge (deepCopy $devices) (default (dict) .resources.limits) | toYaml | nindent 4 }}
{{- end }}

{{- /* Probes of root on a named port. Startup takes as long as weights may take to load; ready is who has said so for
`settled` seconds. */}}
{{- define "pdserve.probes" -}}
{{- $probes := .root.Values.probes -}}
startupProbe:
  httpGet: {path: {{ .startup }}, port: {{ .port }}}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ include "pdserve.startupFailures" .root }}
readinessProbe:
  httpGet: {path: {{ .ready | default "/ready" }}, port: {{ .port }}}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: 1
  {{- with .settled }}
  successThreshold: {{ add1 (ceil (divf . $probes.periodSeconds)) }}
  {{- end }}
livenessProbe:
  httpGet: {path: /live, port: {{ .port }}}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ $probes.livenessFailures }}
{{- end }}
{{- define "pdserve.startupFailures" -}}
{{ add1 (ceil (divf .Values.config.times.start_timeout .Values.probes.periodSeconds)) }}
{{- end }}
