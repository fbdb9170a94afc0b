{{- define "freshrank.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Call with (dict "root" $ "component" "triton"). */}}
{{- define "freshrank.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "freshrank.labels" -}}
{{ include "freshrank.selector" . }}
app.kubernetes.io/part-of: freshrank
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "freshrank.metadata" -}}
name: {{ include "freshrank.name" .root }}-{{ .suffix | default .component }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "freshrank.labels" . | nindent 2 }}
{{- end -}}

{{- define "freshrank.image" -}}
{{ .repository }}:{{ .tag }}{{ with .digest }}@{{ . }}{{ end }}
{{- end -}}

{{- define "freshrank.homeClaim" -}}
{{ .Values.home.existingClaim | default (printf "%s-home" (include "freshrank.name" .)) }}
{{- end -}}

{{/* The port open to every client; the other one is the publisher's alone. */}}
{{- define "freshrank.inferencePort" -}}
{{ ternary "8001" "8000" (eq .Values.triton.inferenceProtocol "grpc") }}
{{- end -}}

{{- define "freshrank.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "freshrank.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/*
Labels and annotations of a pod, those of the values last. "version": whether the pod says of which chart it is; "settings":
whether it restarts when a setting changes; "publisher": whether it may publish.
*/}}
{{- define "freshrank.podMetadata" -}}
labels:
  {{- include (ternary "freshrank.labels" "freshrank.selector" (.version | default false)) . | nindent 2 }}
  {{- if .publisher }}
  freshrank/publisher: "true"
  {{- end }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- if or .settings .values.podAnnotations }}
annotations:
  {{- if .settings }}
  {{- include "freshrank.settingsChecksum" .root | nindent 2 }}
  {{- end }}
  {{- with .values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* More entries of `env`. Call with (dict "values" .Values.triton "indent" 12). */}}
{{- define "freshrank.extraEnv" -}}
{{- with .values.extraEnv }}
{{- toYaml . | nindent (int $.indent) }}
{{- end }}
{{- end -}}

{{- define "freshrank.jobsAccount" -}}
{{ .Values.serviceAccount.name | default (printf "%s-jobs" (include "freshrank.name" .)) }}
{{- end -}}

{{/* enableServiceLinks: Kubernetes would inject FRESHRANK_TRITON_PORT=tcp://… for a Service of that name. */}}
{{- define "freshrank.pod" -}}
serviceAccountName: {{ .account | default (include "freshrank.name" .root) }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- include "freshrank.podSecurity" .user | nindent 2 }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "freshrank.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "freshrank.selector" . | nindent 8 }}
{{- end -}}

{{/* A changed setting must restart the pods that read it. */}}
{{- define "freshrank.settingsChecksum" -}}
freshrank/settings: {{ include (print .Template.BasePath "/settings.yaml") . | sha256sum }}
{{- end -}}

{{- define "freshrank.env" -}}
- name: HOME
  value: /tmp
- name: FRESHRANK_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret }}
      key: {{ .Values.redis.urlKey }}
{{- end -}}

{{/* Keys of the bucket, for what reads or writes it; nothing where the service account's own identity does. */}}
{{- define "freshrank.storageEnv" -}}
{{- with .Values.storage }}
{{- if .existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .accessKeyKey }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .secretKeyKey }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "freshrank.halfOfTheCores" -}}
{{- $limit := .Values.triton.resources.limits.cpu -}}
{{- $cores := hasSuffix "m" $limit | ternary (divf (trimSuffix "m" $limit | float64) 1000) ($limit | float64) -}}
{{- max 1 (divf $cores 2 | floor | int) -}}
{{- end -}}

{{/* Bytes of a quantity as Kubernetes writes it, `1.5Gi`, or as Redis does, `96mb`. */}}
{{- define "freshrank.bytes" -}}
{{- $unit := regexFind "[A-Za-z]*$" . -}}
{{- $units := dict "" 1.0 "m" 1e-3 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18
  "kb" 1024.0 "mb" 1048576.0 "gb" 1073741824.0
  "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 -}}
{{- mulf (trimSuffix $unit . | float64) (get $units $unit) -}}
{{- end -}}

{{/* "yes" where the first of two quantities is above the second, else nothing. Call with (list "1500m" "1"). */}}
{{- define "freshrank.exceeds" -}}
{{- if gt (include "freshrank.bytes" (first .) | float64) (include "freshrank.bytes" (last .) | float64) }}yes{{ end -}}
{{- end -}}

{{- define "freshrank.kubeflowHost" -}}
{{ .Values.kubeflow.host | trimSuffix "/" }}
{{- end -}}

{{/* Where Kubeflow runs the steps; empty where nothing says so. Without profiles that is where Kubeflow itself is. */}}
{{- define "freshrank.stepsNamespace" -}}
{{- $service := "^https?://[^./:]+[.]([^./:]+)[.]svc([.:].*)?$" -}}
{{- $host := include "freshrank.kubeflowHost" . -}}
{{- .Values.kubeflow.namespace | default (regexMatch $service $host | ternary (regexReplaceAll $service $host "$1") "") -}}
{{- end -}}
